# Sourced by the training recipes: `method mdlm|bd3lm ...` checks the first argument, `launch N FLAGS` starts train.py on
# N processes. A mistake in a flag ends in train.py's one line and status 2 (`check FLAGS`), before torchrun is started.
set -eu
cd "$(dirname "$0")"
recipe=$PWD/$(basename "$0")
cd ..
[ ! -x .venv/bin/python ] || PYTHON=${PYTHON:-.venv/bin/python}
export PYTHON="${PYTHON:-python}"

method() {
    case ${1:-} in
    mdlm | bd3lm) ;;
    -h | --help)
        sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$recipe"
        echo "The flags: $PYTHON train.py --help"
        exit 0
        ;;
    *)
        echo "$0: the first argument is ${1:-missing}; expected mdlm or bd3lm, then flags of train.py" >&2
        exit 2
        ;;
    esac
}

check() {
    "$PYTHON" -c 'import sys, cli, train
with cli.one_line_errors("train.py"):
    train.Settings.parse(sys.argv[1:])' "$@"
}

launch() {
    processes=$1
    shift
    if [ "$processes" = 1 ]; then exec "$PYTHON" train.py "$@"; fi
    check "$@"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # as torchrun sets it, which then remarks on it
    exec "$PYTHON" recipes/launch.py --standalone --nproc_per_node "$processes" train.py "$@"
}
