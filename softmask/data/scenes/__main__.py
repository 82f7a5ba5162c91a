import sys

from softmask.data.scenes import write
from softmask.data.scenes.tasks import write as tasks

if __name__ == "__main__":
    arguments = sys.argv[1:]
    if "--tasks" in arguments:
        arguments.remove("--tasks")
        sys.exit(tasks.main(arguments))
    sys.exit(write.main(arguments))
