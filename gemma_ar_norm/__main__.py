"""`python -m gemma_ar_norm`: the demo. `python -m gemma_ar_norm soak`: the soak."""

import sys
from collections.abc import Sequence

from gemma_ar_norm import demo


def main(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["soak"]:
        from gemma_ar_norm import soak

        return soak.main(arguments[1:])
    return demo.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
