import sys

from softmask.data.scenes.write import main

if __name__ == "__main__":
    sys.exit(main())
