"""A proxy on this machine in front of a web server, whose answers it holds back, breaks off or cuts short."""

import contextlib
import socket
import struct
import threading
import time


class FlakyProxy:
    """Forwards connections to a port; `kind` says what happens to answers, and `every` to which."""

    def __init__(self, port):
        self.kind, self.every, self.faults = None, 1, 0
        self._port, self._answers, self._lock, self._open = port, 0, threading.Lock(), True
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept)
        self._pumps = []
        self._thread.start()

    @contextlib.contextmanager
    def doing(self, kind, every=1):
        """Inside, of so many pieces of answers one is slow, stalled, reset or truncated, or all in turn ("any")."""
        self.kind, self.every, self.faults, self._answers = kind, every, 0, 0
        try:
            yield
        finally:
            self.kind = None

    def close(self):
        self._open = False
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join()
        for pump in self._pumps:
            pump.join()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                server = socket.create_connection(("127.0.0.1", self._port))
                for source, target, answers in ((client, server, False), (server, client, True)):
                    pump = threading.Thread(target=self._pump, args=(source, target, answers), daemon=True)
                    pump.start()
                    self._pumps.append(pump)

    def _pump(self, source, target, answers):
        # The other direction may have ended already, and closed both.
        with contextlib.suppress(OSError):
            source.settimeout(0.2)
            while self._open:
                try:
                    data = source.recv(2**16)
                except TimeoutError:
                    continue
                if not data:
                    break
                if answers and self.kind and self._is_next() and self._break(target, data):
                    break
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _is_next(self):
        with self._lock:
            self._answers += 1
            self.faults += self._answers % self.every == 0
            return self._answers % self.every == 0

    def _break(self, target, data):
        """Do what is to be done to an answer; True where it ends the connection."""
        kind = ("stall", "reset", "truncate")[self.faults % 3] if self.kind == "any" else self.kind
        if kind == "slow":
            time.sleep(0.2)
            return False
        if kind == "stall":
            time.sleep(2.5)
        elif kind == "reset":
            target.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            target.sendall(data[: len(data) // 2])
        target.close()
        return True
