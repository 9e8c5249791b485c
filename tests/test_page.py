"""Pages: what a template may do, and what it may not."""

import pytest
from jinja2 import UndefinedError

from trainer.shared.page import Picture, Section, between, percent, render

TEMPLATE = """{% extends "page.html.jinja" %}
{% from "parts.html.jinja" import table, facts, picture, note %}
{% block header %}<h1>{{ title }}</h1>{% endblock %}
{% block body %}
{% set it = section.content %}
{{ table([("name", "explained"), ("value", "strong"), ("raw", "code")], it.rows) }}
{{ facts([("one", "plain"), ("two", ("a", "b"))]) }}
{{ picture(it.picture) }}
{{ note("") }}
{% endblock %}
"""


@pytest.fixture
def template(tmp_path):
    path = tmp_path / "own.html.jinja"
    path.write_text(TEMPLATE)
    return path


def section(**changed):
    content = {"rows": [(("<b>", "why"), 3, "x&y")], "picture": Picture("data:,", 'a "cat"', "cat", "right")}
    return Section("first", "The first", "What <it> is.", {**content, **changed})


def test_text_is_escaped_wherever_it_stands(template):
    page = render(template, title="<script>", sections=[section()])
    assert page.startswith("<!doctype html>\n")
    assert "<script" not in page
    assert '<a href="#first">The first</a>' in page
    assert "<p>What &lt;it&gt; is.</p>" in page
    assert '<td>&lt;b&gt;<small>why</small></td><td class="number"><b>3</b></td><td><code>x&amp;y</code></td>' in page
    assert "<dd>plain</dd>" in page
    assert "<dd><code>a</code>, <code>b</code></dd>" in page
    assert 'alt="a &#34;cat&#34;, right class"' in page
    assert '<figcaption><b class="right">✓</b> cat</figcaption>' in page
    assert 'class="note"' not in page


def test_a_value_that_is_missing_is_no_empty_text(template):
    with pytest.raises(UndefinedError, match="rows"):
        render(template, title="t", sections=[Section("first", "", "", {"picture": Picture("data:,", "")})])
    with pytest.raises(UndefinedError, match="sections"):
        render(template, title="t")


def test_a_page_may_fetch_nothing(template):
    page = render(template, title="t", sections=[section()])
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in page
    assert "url(" not in page


def test_fractions_are_said_in_per_cent():
    assert (percent(0.1234), between((0.1, 0.25))) == ("12.3%", "10.0 to 25.0%")
