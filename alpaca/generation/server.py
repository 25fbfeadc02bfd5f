"""Which server is asked: its address, key and query parameters, from the flag and the environment."""

import dataclasses
import os
import re
import urllib.parse
import urllib.request

from alpaca.common.errors import UserError
from alpaca.common.run_record import is_secret
from alpaca.generation.prices import DEFAULT_MODEL

OFFICIAL_URL, OFFICIAL_HOST = "https://api.openai.com/v1", "api.openai.com"


@dataclasses.dataclass(frozen=True)
class Server:
    """A server with OpenAI's API. `query` is sent with every request (Azure's api-version)."""

    url: str
    key: str
    query: dict[str, str]
    official: bool  # OpenAI itself

    def unreachable(self, error: Exception) -> UserError:
        """The error for a server that nothing has been heard of."""
        parts = urllib.parse.urlsplit(self.url)
        proxies = urllib.request.getproxies()
        proxy = proxies.get(parts.scheme) or proxies.get("all")
        through = ""
        if proxy and not urllib.request.proxy_bypass(parts.hostname):
            proxy = re.sub(r"//[^/@]*@", "//", proxy)  # without name and password
            through = f" through the proxy {proxy} of {parts.scheme.upper()}_PROXY"
        advice = "Is the server running, and is --base_url right?"
        if through:
            advice = f"Is the proxy running? Add {parts.hostname} to NO_PROXY to go without it."
        return UserError(f"no connection to {self.url}{through}: {error.__cause__ or error}\n{advice}")


def find_server(base_url: str | None) -> Server:
    """The server of --base_url, OPENAI_BASE_URL, or OpenAI; UserError where there is nobody to ask."""
    given = base_url or os.environ.get("OPENAI_BASE_URL") or OFFICIAL_URL
    if not re.match(r"https?://[^/]", given):
        raise UserError(f"--base_url must begin with http:// or https://, found {given!r}.")
    parts = urllib.parse.urlsplit(given)
    query = dict(urllib.parse.parse_qsl(parts.query))
    if parts.password or parts.username or any(map(is_secret, query)):
        raise UserError(  # an address stands in run.json and in messages
            "--base_url (or OPENAI_BASE_URL) holds a password or key, which would land in the run's files. Take it out "
            "of the address and type: export OPENAI_API_KEY=..."
        )
    url = urllib.parse.urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/"), "", ""))
    official = (parts.hostname or "").endswith(OFFICIAL_HOST)
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key and official:
        raise UserError(
            "no model to ask: OPENAI_API_KEY is not set and no --base_url is given. One of these will do:\n"
            f"  export OPENAI_API_KEY=sk-...            then the same command again (model {DEFAULT_MODEL})\n"
            "  --base_url http://127.0.0.1:8080/v1     any server with OpenAI's API, as `python local_llm.py serve`\n"
            "  --dry_run True                          the first prompt and the estimated cost, without asking"
        )
    return Server(url, key or "none", query, official)
