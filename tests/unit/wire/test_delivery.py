"""What goes with a key is read strictly, and binds the wrapped key byte by byte."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cgpu_agent.errors import HostileInput
from cgpu_agent.wire import strictjson
from cgpu_agent.wire.delivery import DeliveryContext, hpke_info, parse_context
from fixtures.bundles import caller

CONTEXT = DeliveryContext("models/llama", "sealed", 3, 41, 1_800_000_300, caller(), bytes(32))


@pytest.mark.parametrize("context", [CONTEXT, replace(CONTEXT, recipient=None, generation=0)])
def test_round_trip(context: DeliveryContext) -> None:
    assert parse_context(context.encode()) == context


def test_info_begins_with_its_own_domain() -> None:
    assert hpke_info(b"context") == b"cgpu/key/1\0context"


@pytest.mark.parametrize(
    ("changed", "slug"),
    [
        ({"version": 1}, "BAD_FIELD"),
        ({"key": "../x"}, "BAD_FIELD"),
        ({"broker": "Sealed"}, "BAD_FIELD"),
        ({"generation": -1}, "BAD_FIELD"),
        ({"recipient": "00"}, "BAD_FIELD"),
        ({"caller": []}, "BAD_FIELD"),
        ({"more": 1}, "UNKNOWN_KEY"),
    ],
)
def test_refuses_what_is_malformed(changed: dict[str, object], slug: str) -> None:
    document = {**strictjson.loads(CONTEXT.encode(), "context", 1 << 16), **changed}
    with pytest.raises(HostileInput) as raised:
        parse_context(strictjson.dumps(document))
    assert raised.value.slug == slug
