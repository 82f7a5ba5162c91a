import sys

from softmask.data.scenes.draw import main

if __name__ == "__main__":
    sys.exit(main())
