"""Who may do what, and with what: OAuth's tokens, a machine's metadata server, Secret Manager, a registry of images."""

import base64
import contextlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from google.auth.credentials import CredentialsWithRegionalAccessBoundary
from google.cloud import secretmanager_v1

from vertex.http import Answer, RefusedError, Request, Route, as_json

# A service account's credentials would ask Google where they may be used, in a thread that can outlive the test that made them.
CredentialsWithRegionalAccessBoundary._is_regional_access_boundary_lookup_required = lambda _: False

KEY = (
    rsa.generate_private_key(public_exponent=65537, key_size=2048)
    .private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    .decode()
)
ACCESS_TOKEN = "planted-access-token"


class Accounts:
    """`images` are digests by NAME:TAG, `secrets` texts by the name of a version."""

    def __init__(self) -> None:
        self.images: dict[str, str] = {}
        self.secrets: dict[str, str] = {}
        self.token_ok = True
        self.project, self.account = "my-project", "sogclr-steps@my-project.iam.gserviceaccount.com"
        """Those of a machine, as its metadata server says them."""
        version = "(?P<name>projects/[^/]+/secrets/[^/]+/versions/[^/]+)"
        self.routes: list[Route] = [
            ("POST", "/token", self._token),
            ("POST", "/oauth2/v[34]/token", self._token),
            ("HEAD", "/v2/(?P<name>.+)/manifests/(?P<tag>[^/]+)", self._manifest),
            ("GET", f"/v1/{version}:access", self._secret),
            ("GET", "/v1/projects/-/serviceAccounts/(?P<account>[^/]+)/allowedLocations", self._allowed_locations),
            ("GET", "/", self._metadata_root),
            ("GET", "/computeMetadata/v1/(?P<path>.*)", self._metadata),
        ]
        self.services = {
            "google.cloud.secretmanager.v1.SecretManagerService": {
                "AccessSecretVersion": (self._access, secretmanager_v1.AccessSecretVersionRequest.pb())
            }
        }

    def _token(self, request: Request) -> Answer:
        if not self.token_ok:
            raise RefusedError(400, "invalid_grant")
        return as_json({"access_token": ACCESS_TOKEN, "expires_in": 3600, "token_type": "Bearer"})

    def _manifest(self, request: Request, name: str, tag: str) -> Answer:
        digest = self.images.get(f"{name}:{tag}")
        return Answer(200, b"", {"Docker-Content-Digest": digest}) if digest else Answer(404)

    def _text_of(self, name: str) -> bytes:
        if name not in self.secrets:
            raise RefusedError(403, f"Permission denied on {name}")
        return self.secrets[name].encode()

    def _secret(self, request: Request, name: str) -> Answer:
        return as_json({"name": name, "payload": {"data": base64.b64encode(self._text_of(name)).decode()}})

    def _access(self, request: Any) -> Any:
        return secretmanager_v1.AccessSecretVersionResponse.pb()(name=request.name, payload={"data": self._text_of(request.name)})

    def _allowed_locations(self, request: Request, account: str) -> Answer:
        return as_json({"locations": [], "encodedLocations": "0x0"})

    def _metadata_root(self, request: Request) -> Answer:
        return Answer(200, b"", {"Metadata-Flavor": "Google"})

    def _metadata(self, request: Request, path: str) -> Answer:
        if request.headers.get("metadata-flavor") != "Google":
            raise RefusedError(403, "Missing Metadata-Flavor:Google header.")
        head, _, rest = path.strip("/").removeprefix("instance/service-accounts/").partition("/")
        found: Any = {
            "project/project-id": self.project,
            "universe/universe-domain": "googleapis.com",
            "universe/universe_domain": "googleapis.com",
            "instance/zone": f"projects/1/zones/{_ZONE}",
        }.get(path.strip("/"))
        if head in ("default", self.account) and path.startswith("instance/service-accounts/"):
            found = {
                "": {"email": self.account, "scopes": [_SCOPE], "aliases": ["default"]},
                "email": self.account,
                "scopes": _SCOPE,
                "token": {"access_token": ACCESS_TOKEN, "expires_in": 3599, "token_type": "Bearer"},
            }.get(rest)
        if found is None:
            raise RefusedError(404, f"there is no {path}")
        kind = "application/text" if isinstance(found, str) else "application/json"
        content = found if isinstance(found, str) else json.dumps(found)
        return Answer(200, content.encode(), {"Metadata-Flavor": "Google", "Content-Type": kind})


_SCOPE = "https://www.googleapis.com/auth/cloud-platform"
_ZONE = "europe-west4-a"


def give_credentials(patch: pytest.MonkeyPatch, folder: Path, project: str, url: str) -> None:
    """Gives this process a service account whose tokens come from `url`, and no other way to Google."""
    patch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(write_key(folder, project, url)))
    patch.setattr("google.auth.compute_engine._metadata._NO_GCE_CHECK", True)


def write_key(folder: Path, project: str, url: str) -> Path:
    """Writes the key file of a service account whose tokens come from `url`."""
    key = folder / "key.json"
    about = {"type": "service_account", "project_id": project, "client_email": f"me@{project}.iam.gserviceaccount.com"}
    key.write_text(json.dumps({**about, "private_key": KEY, "token_uri": f"{url}/token", "private_key_id": "1"}))
    return key


@contextlib.contextmanager
def nothing_leaves_this_machine(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails where so much as the name of another machine is looked up."""
    asked, real = [], socket.getaddrinfo

    def look_up(host: Any, *args: Any, **named: Any) -> Any:
        if host not in ("localhost", "127.0.0.1", "::1"):
            asked.append(host)
            raise socket.gaierror(f"no name but this machine's: {host}")
        return real(host, *args, **named)

    patch.setattr(socket, "getaddrinfo", look_up)
    yield
    assert asked == []
