"""What a container of a compiled pipeline starts: KFP's command, and Google's launcher of custom jobs, each with a change."""

from collections.abc import Sequence

_TRAP = """\
child= told=
trap 'told=yes; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || :' TERM INT
"""
_WAIT = """\
child=$!
[ -z "$told" ] || kill -TERM "$child" 2>/dev/null || :
code=
while :; do
    told=
    wait "$child" && now=0 || now=$?
    [ "$now" = 127 ] && [ -n "$code" ] || code=$now
    [ -n "$told" ] || break
done
exit "$code"
"""


def with_init(command: Sequence[str]) -> list[str]:
    """Returns KFP's command with its shell as an init that passes SIGTERM on to Python and ends as Python does.

    The shell is PID 1 of the container. The kernel drops a SIGTERM to PID 1 that has no handler for it: Python in the shell's
    place would not hear it until it installs one, after seconds of imports or never, and KFP's shell does not pass it on. As a
    child, a step without a handler ends at once. SIGINT is passed on as SIGTERM, because a shell's background child ignores it.

    `wait` returns early for each signal, with a status that is not the child's, so it is called until none came meanwhile. It
    returns 127 where an earlier call has returned the child's status.
    """
    start = "_KFP_RUNTIME=true python3 -m"
    assert sum(start in part for part in command) == 1, "KFP starts components in another way than 2.17 does"
    checked = '[ -z "$told" ] || exit 143\n'
    return [_TRAP + part.replace(start, checked + start).rstrip() + " &\n" + _WAIT if start in part else part for part in command]
