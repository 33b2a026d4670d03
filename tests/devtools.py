"""A real browser for tests: Chromium without a window, spoken to over its debugging protocol."""
import base64
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import time
import urllib.request
from pathlib import Path

BROWSER = next((shutil.which(n) for n in ("chromium", "chromium-browser", "google-chrome", "chrome") if shutil.which(n)), None)


class DevTools:
    "The few words of Chromium's debugging protocol that a test needs, over a plain WebSocket."

    def __init__(self, folder: Path):
        self.process = subprocess.Popen([BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
                                         "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", f"--user-data-dir={folder}", "--remote-debugging-port=0", "about:blank"],
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port_file, deadline = folder / "DevToolsActivePort", time.monotonic() + 60
        while not (port_file.exists() and port_file.read_text().strip()):
            assert time.monotonic() < deadline, "Chromium did not start"
            time.sleep(.1)
        self.port = int(port_file.read_text().split()[0])
        pages = json.load(urllib.request.urlopen(f"http://127.0.0.1:{self.port}/json/list"))
        url = next(p["webSocketDebuggerUrl"] for p in pages if p["type"] == "page")
        self.socket = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        key = base64.b64encode(os.urandom(16)).decode()
        self.socket.sendall(f"GET {re.sub(r'^ws://[^/]+', '', url)} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode())
        while b"\r\n\r\n" not in (head := self.socket.recv(4096, socket.MSG_PEEK)):
            pass
        self.socket.recv(head.index(b"\r\n\r\n") + 4)
        self.count, self.events = 0, []

    def _read(self, n: int) -> bytes:
        parts = b""
        while len(parts) < n:
            part = self.socket.recv(n - len(parts))
            assert part, "the browser hung up"
            parts += part
        return parts

    def _message(self) -> dict:
        payload, last = b"", False
        while not last:
            first, second = self._read(2)
            last, length = bool(first & 128), second & 127
            if length > 125:
                length = struct.unpack(">H" if length == 126 else ">Q", self._read(2 if length == 126 else 8))[0]
            payload += self._read(length)
        return json.loads(payload)

    def call(self, method: str, **params) -> dict:
        self.count += 1
        text = json.dumps(dict(id=self.count, method=method, params=params)).encode()
        mask, n = os.urandom(4), len(text)
        size = struct.pack(">B", 128 | n) if n < 126 else struct.pack(">BH", 254, n)
        self.socket.sendall(b"\x81" + size + mask + bytes(b ^ mask[i % 4] for i, b in enumerate(text)))
        while True:
            message = self._message()
            if message.get("id") == self.count:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def evaluate(self, script: str):
        return self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)["result"].get("value")

    def open(self, path: Path, width: int) -> None:
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=1000, deviceScaleFactor=1, mobile=width < 600)
        self.call("Page.navigate", url=path.resolve().as_uri())
        deadline = time.monotonic() + 60
        while self.evaluate("document.readyState + '|' + location.href.startsWith('file:')") != "complete|true":
            assert time.monotonic() < deadline
            time.sleep(.1)

    def complaints(self) -> list[str]:
        bad = []
        for e in self.events:
            p = e.get("params", {})
            if e.get("method") == "Runtime.exceptionThrown":
                bad.append(str(p["exceptionDetails"].get("text")))
            if e.get("method") == "Log.entryAdded" and p["entry"]["level"] in ("error", "warning"):
                bad.append(p["entry"]["text"])
            if e.get("method") == "Runtime.consoleAPICalled" and p["type"] in ("error", "warning"):
                bad.append(str(p["args"]))
            if e.get("method") == "Network.requestWillBeSent" and not p["request"]["url"].startswith(("file:", "data:", "about:")):
                bad.append("fetched " + p["request"]["url"])
        return bad

    def close(self) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait(20)
