"""Mutual TLS for the TCP connections between agents, where certificates are configured.

A connection is wrapped as soon as it is open, before HELLO. What this module gives back is one end of a socket pair,
whose other end it pumps into the TLS connection, so that everything behind it (native code too, which knows nothing of
TLS) goes on with a plain socket. That costs copies and the event loop's time: where the network is encrypted anyway,
leave it out. Both ends must show a certificate of the configured authority; *which* node it is, the ticket proves
(:mod:`.tickets`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
from typing import Final

from p2pkv.config import Peer as PeerSettings
from p2pkv.errors import ConfigError

PIECE_BYTES: Final = 256 << 10
HANDSHAKE_S: Final = 2.0

log = logging.getLogger("p2pkv.gossip")


class Tls:
    """Contexts made of certificate files, anew when these change (they are rotated while agents run).

    Raises:
        ConfigError: a file is missing, or is no certificate, key or authority.
    """

    def __init__(self, certificate: str, key: str, authority: str) -> None:
        self._paths = (certificate, key, authority)
        self._stamp: tuple[object, ...] = ()
        self._contexts: tuple[ssl.SSLContext, ssl.SSLContext]
        self._pumps: set[asyncio.Task[None]] = set()
        self._load()

    @classmethod
    def from_settings(cls, settings: PeerSettings) -> Tls | None:
        """What the settings ask for; None where they name no certificate."""
        paths = (settings.tls_certificate, settings.tls_key, settings.tls_authority)
        return cls(*paths) if all(paths) else None

    def _load(self) -> None:
        try:
            stamp = tuple((found.st_mtime_ns, found.st_ino, found.st_size) for found in map(os.stat, self._paths))
            if stamp == self._stamp:
                return
            self._contexts = self._make(ssl.PROTOCOL_TLS_CLIENT), self._make(ssl.PROTOCOL_TLS_SERVER)
            self._stamp = stamp
        except (OSError, ssl.SSLError) as error:
            hint = "peer.tls_certificate, tls_key and tls_authority are PEM files that this process can read."
            raise ConfigError(
                "the certificates cannot be used", paths=self._paths, reason=str(error), hint=hint
            ) from error

    def _make(self, side: int) -> ssl.SSLContext:
        certificate, key, authority = self._paths
        context = ssl.SSLContext(side)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False  # addresses say nothing; the ticket does
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(certificate, key)
        context.load_verify_locations(authority)
        return context

    async def wrap(self, sock: socket.socket, *, server: bool) -> socket.socket:
        """TLS on an open socket, which is this object's from here on; gives a plain one that takes its place.

        Raises:
            OSError: the other side does not speak TLS, or its certificate is not good (ssl.SSLError is an OSError).
        """
        try:
            self._load()
        except ConfigError as error:
            log.error("certificates stay as they were: %s", error)
        loop = asyncio.get_running_loop()
        inner, ours = socket.socketpair()
        try:
            inner.setblocking(False)
            ours.setblocking(False)
            reader = asyncio.StreamReader(limit=PIECE_BYTES)
            protocol = asyncio.StreamReaderProtocol(reader)
            context = self._contexts[1 if server else 0]
            if server:
                transport, _ = await loop.connect_accepted_socket(
                    lambda: protocol, sock, ssl=context, ssl_handshake_timeout=HANDSHAKE_S
                )
            else:
                transport, _ = await loop.create_connection(
                    lambda: protocol, sock=sock, ssl=context, server_hostname="", ssl_handshake_timeout=HANDSHAKE_S
                )
            writer = asyncio.StreamWriter(transport, protocol, reader, loop)
            plain_reader, plain_writer = await asyncio.open_connection(sock=ours, limit=PIECE_BYTES)
        except BaseException:
            for each in (sock, inner, ours):
                each.close()
            raise
        for source, sink in ((reader, plain_writer), (plain_reader, writer)):
            task = loop.create_task(pump(source, sink), name="p2pkv-tls")
            self._pumps.add(task)
            task.add_done_callback(self._pumps.discard)
        return inner

    async def stop(self) -> None:
        """End what is still pumped."""
        for task in list(self._pumps):
            task.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)


async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    """Bytes of one to the other, until either ends."""
    try:
        while data := await source.read(PIECE_BYTES):
            sink.write(data)
            await sink.drain()
    except OSError:
        pass  # the other end sees it
    finally:
        sink.close()
