"""Where the socket of a node is: a rule that the node and its clients share."""

import posixpath

SOCKET_NAME = "rpc.sock"
# A unix socket's path holds 108 bytes with its final NUL on Linux and 104 on macOS.
SOCKET_PATH_BYTES_MAX = 100


def socket_path(home: str, uid: int) -> str:
    """`HOME/rpc.sock`, or a short path of the user's own where that is too long for a socket.

    `home` is absolute. The folder of the result has to be the user's own, with mode 0700.
    """
    path = posixpath.join(home, SOCKET_NAME)
    if len(path.encode(errors="surrogateescape")) <= SOCKET_PATH_BYTES_MAX:
        return path
    import hashlib  # a few ms that a command with a short path need not pay

    name = hashlib.sha256(home.encode(errors="surrogateescape")).hexdigest()[:24]
    return f"/tmp/blyan-{uid}/{name}.sock"
