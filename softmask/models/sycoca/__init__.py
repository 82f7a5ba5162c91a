"""SyCoCa (Ma et al., ICML 2024) and, with options off, CoCa."""
