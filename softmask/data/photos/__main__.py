import sys

from softmask.data.photos.write import main

if __name__ == "__main__":
    sys.exit(main())
