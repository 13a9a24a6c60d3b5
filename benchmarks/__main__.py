"""`python -m benchmarks [name …]`: each benchmark in a process of its own, in turn. `make bench` runs this."""

import subprocess
import sys

DEFAULT = ("slider", "capture", "streaming", "attention", "live")


def main() -> int:
    names = sys.argv[1:] or DEFAULT
    failed = []
    for name in names:
        print(f"\n== {name} ==", flush=True)
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
