#!/bin/bash
# mailbench-up.sh [FOLDER]: starts a mesh of two offices for a mailbench comparison, makes the people
# that mailbench writes to (u001 … u100, password "secret", all at home in plzen), and writes
# FOLDER/posthouse.env for suite.sh. EXE names another program than bin/posthouse.
#
#   simtest/bench/mailbench-up.sh ours && suite.sh out.jsonl theirs.env ours/posthouse.env
#   simtest/bench/mailbench-down.sh ours
set -euo pipefail
D=${1:-${TMPDIR:-/tmp}/posthouse-mailbench}
EXE=${EXE:-$(cd "${BASH_SOURCE%/*}/../.." && pwd)/bin/posthouse}
"$EXE" demo up --detach --dir "$D" --offices hq,plzen --domain bench.test --users 1 >/dev/null
S="$D/hq.sock"
have=$("$EXE" user list --json --socket "$S" | grep -c '"u[0-9]*@bench.test"' || true)
if [ "$have" -lt 100 ]; then
    for i in $(seq -f %03g 1 100); do
        "$EXE" user add "u$i@bench.test" --home plzen --password secret --socket "$S" >/dev/null
    done
fi
field() { python3 -c 'import json,sys
d = json.load(open(sys.argv[1]))
n = {x["name"]: x for x in d["nodes"]}[sys.argv[2]]
print(n["pid"] if sys.argv[3] == "pid" else "%s:%d" % (n["address"], n["ports"][sys.argv[3]]))' "$D/demo.json" "$1" "$2"; }
cat > "$D/posthouse.env" <<ENV
# Ours, for suite.sh. Discarding is not for us: our figures of acceptance include delivery into mailboxes.
TARGET=posthouse
PIDS=$(field plzen pid)
PIDS2=$(field hq pid),$(field plzen pid)
PIDS3=
IPIDS=$(field plzen pid)
SMTP=$(field plzen smtp)
SUBMIT=$(field plzen submission)
ENTRY=$(field hq smtp)
IMAP=$(field plzen imaps)
IMAPS=$(field plzen imaps)
DOM=bench.test
DOM_DISCARD=bench.test
DOM2=bench.test
DOM2TLS=bench.test
DOM3=
DOM_CRYPT=bench.test
START="$EXE demo up --detach --dir $D"
STOP="$EXE demo down --dir $D"
START_BARE="$EXE demo start plzen --dir $D"
IMAPTLS=-imap-tls=true
ITLS=-tls=true
AUTHUSER=u001@bench.test
ENV
echo "$D/posthouse.env"
