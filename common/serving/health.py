"""Whether a server can be used yet: healthy, and serving the model that the config names."""

from __future__ import annotations

import json

import aiohttp

from common.serving.http import status_text
from common.serving.served import DIALECTS, authorization, served_weights
from common.serving.sites import Site

_HEALTH = "/health"  # vLLM's and SGLang's; neither says 200 before its model has been loaded
_LONGEST_SHOWN = 200


async def why_unready(session: aiohttp.ClientSession, site: Site, limit_s: float) -> str | None:
    """Why a site cannot be used yet; None when it can. Raises ServerError when another model is served there, or the
    server's key is not known.
    """
    limit, key = aiohttp.ClientTimeout(total=limit_s), authorization(site.server, site.section)
    models = DIALECTS[site.section.engine].MODELS
    body = b""
    try:
        for path in (_HEALTH, models):
            async with session.get(f"{site.url}{path}", timeout=limit, headers=key) as response:
                if response.status != 200:
                    return f"{path} said {status_text(response.status)}"
                body = await response.read()
    except TimeoutError:
        return f"no reply within {limit_s:g} s"
    except aiohttp.ClientError as error:
        return str(error) or type(error).__name__
    try:
        reply = json.loads(body)
    except (ValueError, RecursionError):
        return f"{models} replied no JSON but {body[:_LONGEST_SHOWN].decode(errors='replace')}"
    served_weights(site.server, site.section, site.served_name, site.url, reply)
    return None
