from __future__ import annotations

import os
import socket

from resist_lightning.comm.sockets import close_inherited, cut_connections, recording, recording_group


def connect(listener: socket.socket) -> tuple[socket.socket, socket.socket]:
    ours = socket.create_connection(listener.getsockname())
    theirs, _ = listener.accept()
    ours.settimeout(5)
    return ours, theirs


def test_connections_of_the_group_are_cut_and_nothing_else():
    with socket.create_server(("127.0.0.1", 0)) as other:
        kept, kept_end = connect(other)
        with recording_group():
            listener = socket.create_server(("127.0.0.1", 0))
            cut, cut_end = connect(listener)
        assert cut_connections() == 2  # both ends are in this process
        assert cut.recv(1) == b""
        kept_end.sendall(b"!")
        assert kept.recv(1) == b"!"
        again, again_end = connect(listener)  # the listening socket still listens
        with recording_group():
            pass
        assert cut_connections() == 0
    for open_socket in (kept, kept_end, cut, cut_end, again, again_end, listener):
        open_socket.close()


def test_a_forked_process_closes_them_and_nothing_else():
    with socket.create_server(("127.0.0.1", 0)) as other:
        kept, kept_end = connect(other)
        with recording(set()):
            listener = socket.create_server(("127.0.0.1", 0))
            ours, theirs = connect(listener)
        go, stay = os.pipe()
        pid = os.fork()
        if pid == 0:  # holds the remaining sockets until the pipe is closed
            os.close(stay)
            close_inherited()
            kept.sendall(b"child")
            os.read(go, 1)
            os._exit(0)
        assert kept_end.recv(5) == b"child"
        ours.close()
        assert theirs.recv(1) == b""  # closed for the peer too
        os.close(stay)
        os.waitpid(pid, 0)
    for open_socket in (kept, kept_end, theirs, listener):
        open_socket.close()
    os.close(go)
