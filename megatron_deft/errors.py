"""The one exception a user can cause."""


class UserError(ValueError):
    """A mistake outside the program: a missing file, a bad key, an impossible layout.

    The message is one line that says what is wrong, where, what is legal and the mend. The command
    line prints it alone and exits with code 2; `--traceback` shows the stack as well.
    """


class TransientError(UserError):
    """What may be gone at the next try, such as a disk's error, or a rank's that lost another.

    Exit code 1: ranks that may be started again are.
    """
