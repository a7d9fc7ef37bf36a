"""``python -m qmemtune``, as launchers of several processes need it."""

import sys

from qmemtune.cli.app import main

sys.exit(main())
