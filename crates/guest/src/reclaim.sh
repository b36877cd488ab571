# Makes the guest give up what it does not need, before a pause.
# Arguments: each step's cap in milliseconds (0 skips it), then the mount to trim.
#
# Prints for each step that it comes to
#   torpor-reclaim STEP begin
#   torpor-reclaim STEP OUTCOME MS MEMFREE_KIB_BEFORE MEMFREE_KIB_AFTER MESSAGE...
# Only the steps themselves fork: a fork costs more than a step on an emulated guest. Time is
# /proc/uptime's: ticks of 10 ms, and nobody sets it.

get_now() {
    read -r up _ </proc/uptime
    now=$((${up%.*} * 1000 + 1${up#*.} * 10 - 1000))
}

get_free() {
    while read -r key free _; do
        [ "$key" = MemFree: ] && return
    done </proc/meminfo
    free=0
}

# run STEP CAP_MS NEEDS COMMAND... : NEEDS is a file without which the kernel cannot do it, or "".
run() {
    step=$1 cap=$2 needs=$3
    shift 3
    echo "torpor-reclaim $step begin"
    get_free; before=$free
    get_now; began=$now
    message= outcome=done
    if [ "$cap" -eq 0 ]; then
        outcome=skipped
    elif [ -n "$needs" ] && [ ! -e "$needs" ]; then
        outcome=unsupported message="no $needs"
    else
        seconds=$((cap / 1000)).$(((cap % 1000) / 100))$(((cap % 100) / 10))$((cap % 10))
        message=$(timeout -s KILL "$seconds" "$@" 2>&1)
        case $? in
            0) ;;
            124 | 137 | 143) outcome=timeout ;;
            127) outcome=unsupported ;;
            *) outcome=failed ;;
        esac
        # fstrim says so when the file system or the drive cannot discard.
        case $message in *"not supported"*) outcome=unsupported ;; esac
    fi
    get_now
    get_free
    message=${message##*
}
    echo "torpor-reclaim $step $outcome $((now - began)) $before $free $message"
}

run sync "$1" '' sync
run drop_caches "$2" /proc/sys/vm/drop_caches sh -c 'echo 3 >/proc/sys/vm/drop_caches'
run compact_memory "$3" /proc/sys/vm/compact_memory sh -c 'echo 1 >/proc/sys/vm/compact_memory'
run fstrim "$4" "$5" fstrim -v "$5"
