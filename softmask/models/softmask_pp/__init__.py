"""SoftMask++ (Park & Han, CVPR 2023) and, with options off, ALBEF."""
