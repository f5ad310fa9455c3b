"""Images of a prompt: from where a record names them to what a model server takes."""

from __future__ import annotations

import base64
import mimetypes
import os
from pathlib import Path

from common.config.section import ConfigError


def image_url(source: str) -> str:
    """A web address or data URL as it is; a file as a data URL of its bytes.

    Raises ConfigError when there is no such file, or its name does not say what kind of image it is.
    """
    if source.startswith(("http://", "https://", "data:")):
        return source
    kind, _ = mimetypes.guess_type(source)
    if kind is None or not kind.startswith("image/"):
        raise ConfigError(f"{source}: is no image by its name. Use a file that ends in .png, .jpg, .webp or the like.")
    try:
        content = Path(os.path.expanduser(source)).read_bytes()
    except (OSError, ValueError) as error:  # the latter of a null byte
        problem = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{source!r}: cannot be read ({problem}). Correct the record's images.") from None
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
