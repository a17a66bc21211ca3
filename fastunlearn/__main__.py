import sys

from fastunlearn.cli import main

sys.exit(main())
