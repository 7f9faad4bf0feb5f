"""`python -m gemma_ar_norm`: the demo."""

import sys

from gemma_ar_norm.demo import main

if __name__ == "__main__":
    sys.exit(main())
