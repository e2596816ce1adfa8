"""Describes the server's addresses as OpenAPI does."""

from __future__ import annotations

from typing import Any

from nft_plugins.wire import VERSION

from ..remote.http import MESSAGE

FORMAT = (
    f"A message of version {VERSION}, which nft_plugins.wire writes and reads: `NFTW`, the version (2 bytes), "
    "2 empty bytes, the length of the JSON (4 bytes) and of the tensors (8 bytes), all little-endian; then the "
    "JSON, and a safetensors file. "
)
ASKED = (
    "The JSON has `reward`, its name, `digest`, as /rewards gives it, and `seconds`, how long to wait at most. "
)
SCORED = (
    "A message whose JSON has `scores` (names of details, notes and parts), and whose tensors are `values`, "
    "`valid` and `detail0`, `detail1` and so on."
)
CHECKED = "JSON with `refusals`: for each prompt why it can never be scored, and an empty text where it can."
REFUSALS = {
    "400": "The request is no message of the form that is asked for.",
    "401": "The token is missing or wrong.",
    "404": "The server does not offer that reward.",
    "409": "The reward is another one than when the client began.",
    "411": "The request does not say its length.",
    "413": "The request has too many bytes, or too many or too large images.",
    "415": f"The content type is not {MESSAGE}.",
    "422": "The reward can never score a prompt, or reads prompts and there were none.",
    "429": "The queue is full: come again after the seconds in Retry-After.",
    "500": "The reward failed.",
    "503": "The server ends: ask another one, or come again after the seconds in Retry-After.",
    "504": "The request has waited longer than its client does.",
}
PATHS = {
    "/score": "Score images. "
    + ASKED
    + "It also has `prompts` and `metadata`, one for each image. The tensors are `images` [B, 3, H, W] (uint8, "
    "or float32 for rewards with `needs_floats`), `groups` [B] int64, and `whole` [B] bool where one has NaN.",
    "/regroup": "Let a reward compare the images of whole groups. "
    + ASKED
    + "The rest is as in an answer of /score, with the tensor `groups`.",
    "/check": "Say which prompts a reward can never score, and why. "
    + ASKED
    + "It also has `prompts` and `metadata`, an object for each.",
}
SHOWN = {
    "/health": ("Say that the server is well. It needs no token.", "application/json"),
    "/rewards": ("Show the rewards' cards, the versions and the limits.", "application/json"),
    "/metrics": ("Show figures for Prometheus.", "text/plain"),
    "/openapi.json": ("Show this description. It needs no token.", "application/json"),
}


def describe_api(version: str) -> dict[str, Any]:
    """Describe all addresses. version: of nft-hub."""
    refusal = {"type": "object", "properties": {"error": {"type": "string"}, "text": {"type": "string"}}}
    failures = {
        status: {"description": text, "content": {"application/json": {"schema": refusal}}}
        for status, text in REFUSALS.items()
    }
    paths: dict[str, Any] = {}
    for path, text in PATHS.items():
        kind, told = (MESSAGE, SCORED) if path != "/check" else ("application/json", CHECKED)
        answer = {"description": told, "content": {kind: {}}}
        body = {"required": True, "content": {MESSAGE: {"schema": {"type": "string", "format": "binary"}}}}
        about = {"description": FORMAT + text, "requestBody": body}
        paths[path] = {"post": about | {"responses": {"200": answer} | failures}}
    for path, (text, kind) in SHOWN.items():
        free: dict[str, Any] = {"security": []} if "no token" in text else {}
        paths[path] = {
            "get": free
            | {"description": text, "responses": {"200": {"description": text, "content": {kind: {}}}}}
        }
    return {
        "openapi": "3.1.0",
        "info": {"title": "nft serve", "version": version},
        "components": {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
        "security": [{"token": []}],
        "paths": paths,
    }
