"""The graph of a circuit: every edge is drawn where its nodes are, as its numbers say; in a browser, it answers."""

import json
import re

import numpy as np
import pytest
import torch

import mechinterp as mi
from mechinterp.circuits.circuit import Circuit
from mechinterp.circuits.find import find
from mechinterp.circuits.graph import Graph
from mechinterp.errors import UserError
from mechinterp.reporting import Report
from mechinterp.reporting.network import Edge, Node, network
from mechinterp.reporting.sections.circuits import MAX_EDGES, circuit_figure, circuit_section
from mechinterp.tasks.planted import other_tokens
from tests.circuits.test_files import CASES, random_scores
from tests.families import model, pairs
from tests.reporting.test_browser import browser, point_and_click  # noqa: F401 (a fixture)


def of_kind(figure, kind):
    return [trace for trace in figure.data if (trace.meta or {}).get("kind") == kind]


def interval_of(scores):
    return torch.from_numpy(np.quantile(scores.draws.numpy(), [0.025, 0.975], axis=0)).float()


def drawn(figure):
    """By edge name: first and last point of its curve, and its trace."""
    (numbers,) = of_kind(figure, "network")
    made = {}
    for trace in of_kind(figure, "edge"):
        for i, edge in enumerate(trace.meta["edges"]):
            first, last = i * trace.meta["points"], (i + 1) * trace.meta["points"] - 2
            assert trace.x[last + 1] is None and None not in trace.x[first : last + 1]
            points = [(trace.x[at], trace.y[at]) for at in (first, last)]
            made[numbers.customdata[edge][0]] = (*points, trace)
    return made


@pytest.mark.parametrize(("family", "shape"), [case for case in CASES if case[1] or case[0] in ("gpt2", "neox")])
def test_every_edge_joins_its_nodes(family, shape):
    circuit = random_scores(Graph(model(family), **shape)).select(edges=50, prune=False)
    figure = circuit_figure(circuit)
    (nodes,), edges = of_kind(figure, "node"), drawn(figure)
    place = dict(zip(nodes.meta["names"], zip(nodes.x, nodes.y, strict=True), strict=True))
    assert len(set(place.values())) == len(place)  # no two dots lie on each other
    assert set(edges) == set(circuit.edges) and len(edges) == 50
    for name, (start, end, _) in edges.items():
        source, destination = re.match(r"(.+)->([^<@]+)", name).groups()
        assert start == pytest.approx(place[source], abs=6.1) and end == pytest.approx(place[destination], abs=6.1)
        assert place[source][1] < place[destination][1]  # upwards


def test_width_is_by_size_and_looks_are_by_sign():
    circuit = random_scores(Graph(model("llama"))).select(edges=120, prune=False)
    edges = drawn(circuit_figure(circuit))
    frame = circuit.to_frame().sort_values("score", key=abs)
    widths = [edges[name][2].line.width for name in frame["edge"]]
    assert widths == sorted(widths) and len(set(widths)) == 5
    for name, score in zip(frame["edge"], frame["score"], strict=True):
        line = edges[name][2].line
        red, blue = int(line.color[1:3], 16), int(line.color[5:7], 16)
        assert (red > blue, line.dash == "solid") == (score > 0, score > 0)


def test_numbers_are_those_of_the_circuit():
    scores = random_scores(Graph(model("llama")), draws=30)
    circuit, interval = scores.select(edges=70, prune=False), interval_of(scores)
    (numbers,) = of_kind(circuit_figure(circuit, interval), "network")
    assert numbers.meta["columns"] == ["edge", "score", "ci_low", "ci_high", "inclusion"]
    rows = {row[0]: row[1:] for row in numbers.customdata}
    for name in circuit.edges:
        edge = circuit.graph.edge(name)
        low, high = interval[:, edge].tolist()
        assert rows[name] == pytest.approx([float(circuit.scores[edge]), low, high, float(circuit.inclusion[edge])])
    assert "95% interval" in numbers.text[0] and "inclusion probability" in numbers.text[0]


def test_the_strongest_edges_of_a_large_circuit_are_drawn():
    graph = Graph(model("llama"), positions="roles", places=("A", "B", "END", "rest"))
    scores = random_scores(graph)
    circuit = scores.select(edges=700, prune=False)
    section = circuit_section(circuit)
    shown = set(drawn(section.figures[0]))
    order = torch.argsort(scores.values.abs(), descending=True)[:MAX_EDGES].tolist()
    assert shown == {graph.edge_name(edge) for edge in order} and len(shown) == 400
    assert "300 edges of smaller |score| are left out" in section.text
    assert section.figures[0].layout.title.text == "Circuit: 400 strongest of 700 edges"
    assert len(section.figures[0].to_json()) < 400_000


def test_neurons_are_drawn_as_their_mlp():
    graph = Graph(model("gpt2"), mlp="neuron")
    circuit = Circuit.of(graph, ["embed->m0", "m0.n3->logits", "m0.n7->a1.h2<k>", "a1.h2->logits"])
    figure = circuit_figure(circuit)
    assert of_kind(figure, "node")[0].meta["names"] == ["embed", "m0", "a1.h2", "logits"]
    assert set(drawn(figure)) == set(circuit.edges)


def test_a_circuit_without_scores_is_grey():
    figure = circuit_figure(Circuit.of(Graph(model("gpt2")), ["embed->a0.h1<q>", "a0.h1->logits"]))
    assert {trace.meta["sign"] for trace in of_kind(figure, "edge")} == {0} and not of_kind(figure, "key")
    assert of_kind(figure, "network")[0].customdata[0] == ["embed->a0.h1<q>", None, None, None]
    assert of_kind(figure, "said")[0].text == ("q",)


def test_attention_is_of_the_circuits_heads():
    of = mi.load("planted-induction")
    task = other_tokens(of, n=8)
    circuit = find(Graph(of), task, "eap-ig", draws=0, progress=False).select(edges=24)
    section = circuit_section(circuit, task)
    view = section.attention
    assert view.heads == tuple(f"L{layer}H{head}" for layer, head in circuit.heads)
    _, cache = of.run_with_cache(task.clean.take(torch.tensor([0])), [mi.Site("pattern", 1)])
    expected = cache["pattern", 1][0, circuit.heads[-1][1]]
    assert np.abs(view.patterns[-1] / 255 - expected.numpy()).max() < 1 / 255 and view.patterns.dtype == np.uint8
    assert view.notes[-1].startswith("writes to logits")
    assert section.table.columns == ("edge", "score") and section.table.rows[0][1] == circuit.top(1)["score"][0]
    assert circuit_section(Circuit.of(Graph(of), ["embed->logits"]), task).attention is None


def test_bad_input():
    graph = Graph(model("gpt2"))
    with pytest.raises(UserError, match="no edges to draw"):
        circuit_figure(Circuit.of(graph, []))
    with pytest.raises(UserError, match=r"interval of shape \[2, 5\]"):
        circuit_figure(Circuit.of(graph, ["embed->m0"]), torch.zeros(2, 5))
    with pytest.raises(UserError, match="no node 'b' to draw"):
        network([Node("a", "a", "mlp", 0)], [Edge("a->b", "a", "b", 1.0)])
    with pytest.raises(UserError, match="no edge to draw"):
        network([Node("a", "a", "mlp", 0)], [])


# ---- in a browser --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def circuit_page(tmp_path_factory):
    """A page with the graph of a model with grouped-query attention."""
    of = model("llama")
    task = pairs(of, False, n=6)
    scores = find(Graph(of), task, "eap", draws=20, progress=False, force=True)
    circuit = scores.select(edges=150)
    section = circuit_section(circuit, task, interval_of(scores))
    report = Report(
        "circuit", "Which edges?", circuit.summary(), of.header(), "mechinterp circuit", sections=(section,)
    )
    return report.write(tmp_path_factory.mktemp("circuit") / "report.html"), section, circuit


def test_a_chosen_head_lights_up_its_edges_and_shows_where_it_looks(browser, circuit_page):  # noqa: F811
    path, section, circuit = circuit_page
    assert path.stat().st_size < 10e6
    context = browser.new_context(color_scheme="light", viewport={"width": 1240, "height": 900})
    tab, requests, errors = context.new_page(), [], []
    tab.on("request", lambda item: requests.append(item.url))
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    tab.goto(path.as_uri())
    tab.set_default_timeout(5000)
    plot, details = tab.locator(".plot"), tab.locator(".details")
    tab.wait_for_selector(".plot .scatterlayer .trace")
    (nodes,) = of_kind(section.figures[0], "node")
    n_traces = plot.locator(".scatterlayer .trace").count()

    # With the mouse: the head.
    dots = plot.locator(".scatterlayer .trace:has(.textpoint) .points path")
    head = nodes.meta["names"].index("a1.h2")
    dots.nth(head).scroll_into_view_if_needed()
    box = dots.nth(head).bounding_box()
    point_and_click(tab, box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    details.get_by_role("heading", name="a1.h2", exact=True).wait_for()
    into = [name for name in circuit.edges if "->a1.h2<" in name]
    out = [name for name in circuit.edges if name.startswith("a1.h2->")]
    text = details.inner_text()
    assert re.search(rf"^{len(into)} edges? into it", text, re.M) and re.search(rf"^{len(out)} edges? out", text, re.M)
    largest = max(out, key=lambda name: abs(float(circuit.scores[circuit.graph.edge(name)])))
    assert f"{float(circuit.scores[circuit.graph.edge(largest)]):.3f}".replace("-", "\u2212") in text
    assert plot.locator(".scatterlayer .trace").count() > n_traces
    lit = "plot => [...plot.querySelectorAll('.scatterlayer .trace')].filter(one => one.style.opacity > .9).length"
    assert plot.evaluate(lit) >= 1
    # Its attention, beside the graph and in the panel below.
    assert tab.get_by_role("radio", name="L1H2").get_attribute("aria-checked") == "true"
    details.get_by_role("button", name="Attention of L1H2").click()
    assert tab.evaluate("document.activeElement.textContent") == "L1H2"
    assert tab.locator(".attention .note").inner_text().startswith("L1H2 · writes to")

    # With the keyboard: from the head upwards every step is a higher node, to the logits.
    plot.locator(".canvas").focus()
    heights, names = [], nodes.meta["names"]
    for _ in range(12):
        tab.keyboard.press("ArrowUp")
        heights.append(nodes.y[names.index(details.locator("h3").inner_text())])
    assert heights == sorted(heights) and details.locator("h3").inner_text() == "logits"
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("ArrowLeft")
    assert details.locator("h3").inner_text() != "logits"

    # All edges again, darker or lighter by the theme; over the middle of the strongest one stand its numbers.
    tab.keyboard.press("Escape")
    assert plot.locator(".scatterlayer .trace").count() == n_traces
    dashed = ".scatterlayer .js-line[style*='stroke-dasharray: 6px']"
    colour = f'plot => getComputedStyle(plot.querySelector("{dashed}")).stroke'
    light = plot.evaluate(colour)
    tab.get_by_role("button", name="Dark theme").click()
    assert (light, plot.evaluate(colour)) == ("rgb(33, 102, 172)", "rgb(91, 163, 240)")
    strongest = circuit.top(1)["edge"][0]
    (numbers,) = of_kind(section.figures[0], "network")
    row = [cell[0] for cell in numbers.customdata].index(strongest)
    place = tab.evaluate(
        """([x, y]) => {
            const canvas = document.querySelector('.plot .canvas'), axes = canvas._fullLayout;
            canvas.scrollIntoView({ behavior: 'instant' });
            const box = canvas.getBoundingClientRect();
            return [box.x + axes.xaxis._offset + axes.xaxis.d2p(x), box.y + axes.yaxis._offset + axes.yaxis.d2p(y)];
        }""",
        [numbers.x[row], numbers.y[row]],
    )
    tab.mouse.move(*place)
    label = plot.locator(".hoverlayer .hovertext")
    label.wait_for()
    assert strongest in label.text_content() and "inclusion probability" in label.text_content()
    tab.mouse.click(*place)
    details.locator(".first").wait_for()
    assert details.locator("h3").inner_text() == strongest and "95% interval" in details.inner_text()
    plot.get_by_text("Numbers as a table").click()
    plot.locator("tbody tr").first.wait_for()
    assert plot.locator("tbody tr").count() == len(circuit)
    assert plot.locator("thead th").all_inner_texts()[0] == "edge"
    assert json.dumps(errors) == "[]" and [url for url in requests if not url.startswith(("data:", "blob:"))] == [
        path.as_uri()
    ]
    context.close()
