#!/bin/bash
# mailbench-down.sh [FOLDER] [wipe]: ends what mailbench-up.sh started; with "wipe" its data goes too.
set -uo pipefail
D=${1:-${TMPDIR:-/tmp}/posthouse-mailbench}
EXE=${EXE:-$(cd "${BASH_SOURCE%/*}/../.." && pwd)/bin/posthouse}
"$EXE" demo down --dir "$D"
[ "${2:-}" = wipe ] && rm -rf "$D"
exit 0
