"Pre-commit: refuse files over 200 KB, data/foundation exempt (it has budgets of its own)."
import os, sys

big = [f for f in sys.argv[1:] if os.path.isfile(f) and not f.startswith("data/foundation/") and os.path.getsize(f) > 200*1024]
for f in big: print(f"{f}: {os.path.getsize(f)//1024} KB, the cap is 200 KB; store smaller outputs, or put weights in data/foundation")
sys.exit(bool(big))
