"""The exposition is what Prometheus reads: by its own parser, to the last digit, whatever a label holds."""

from __future__ import annotations

import math
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from cgpu_agent.wire.metrics import Family, Histogram, exposition


def read(text: str) -> dict[str, list[tuple[str, dict[str, str], float]]]:
    """(sample name, labels, value) by family, as the parser of Prometheus' own client reads them."""
    found = {family.name: family for family in text_string_to_metric_families(text)}
    return {name: [(each.name, each.labels, each.value) for each in family.samples] for name, family in found.items()}


@given(
    st.dictionaries(st.from_regex(r"[a-z][a-z_]{0,7}", fullmatch=True), st.text(), max_size=3), st.floats(0, 1e300)
)
def test_labels_and_values_come_back(labels: dict[str, str], value: float) -> None:
    text = exposition([Family("a", "gauge", "Help.", [(labels, value)])])
    assert read(text) == {"a": [("a", labels, value)]}


@pytest.mark.parametrize("value", [0, 1, True, 1_234_567, 2**53 - 1, 0.1, 1e-9, 123456.789])
def test_no_digit_is_lost(value: float) -> None:
    text = exposition([Family("a_total", "counter", "Help.", [({}, value)])])
    assert read(text)["a"][0][2] == value


def test_a_family_without_samples_is_named_all_the_same() -> None:
    assert exposition([Family("a", "gauge", "Help.", [])]) == "# HELP a Help.\n# TYPE a gauge\n"


@given(st.lists(st.floats(0, 1000, allow_nan=False)))
def test_a_histogram_counts_each_observation_in_every_bucket_above_it(values: list[float]) -> None:
    bounds = (0.5, 1, 10)
    histogram = Histogram(bounds)
    for value in values:
        histogram.add(value)
    samples = read(exposition([Family("a", "histogram", "Help.", [({"lane": "x"}, histogram)])]))["a"]
    buckets = {float(labels["le"]): count for name, labels, count in samples if name == "a_bucket"}
    assert buckets == {bound: sum(value <= bound for value in values) for bound in (*bounds, math.inf)}
    rest = {name: count for name, _, count in samples if name != "a_bucket"}
    assert rest["a_count"] == len(values)
    assert rest["a_sum"] == pytest.approx(sum(values))


def test_a_histogram_that_grows_while_it_is_read_never_contradicts_itself() -> None:
    histogram, stop = Histogram((1,)), threading.Event()

    def grow() -> None:
        while not stop.is_set():
            histogram.add(0.5)
            histogram.add(2)

    thread = threading.Thread(target=grow)
    thread.start()
    try:
        for _ in range(200):
            samples = read(exposition([Family("a", "histogram", "Help.", [({}, histogram)])]))["a"]
            counts = [value for name, _, value in samples if name in ("a_bucket", "a_count")]
            assert counts == sorted(counts)
            assert counts[-1] == counts[-2]
    finally:
        stop.set()
        thread.join()
