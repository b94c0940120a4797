"""Texts of many conversations from one run of their chat template.

A template is a program, and runs for each conversation, unless its text shows that it writes what was said as
it is and looks at it nowhere else. Then marks are said in place of the contents, once for all conversations
of the same speakers, and what is written between the marks is the same for all of them.
"""

import re
from collections.abc import Callable, Sequence

import jinja2
from jinja2 import nodes

from gtalign_jax.rollout.template import Messages

_MARK, _HEAD = "qzvxw{}zxqjk", "qzvxw"
_KEYS = {"role", "content"}
# What a loop tells of itself and not of what was said.
_LOOP = frozenset("first last index index0 revindex revindex0 length".split())
_AROUND = (nodes.Template, nodes.For, nodes.If)


def writes_contents_alone(template: str) -> bool:
    """Whether all that a template does with the contents of `messages` is to write them as they are."""
    if _HEAD in template:
        return False
    try:
        tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except jinja2.TemplateSyntaxError:  # of an extension that we do not know
        return False
    loops = [each for each in tree.find_all(nodes.For) if _is_name(each.iter, "messages")]
    said = {each.target.name for each in loops if isinstance(each.target, nodes.Name)}
    return all(isinstance(each.target, nodes.Name) for each in loops) and _harmless(tree, said, "around")


def texts(render: Callable[[Sequence[Messages]], list[str]], conversations: Sequence[Messages]) -> list[str]:
    """What `render` writes of conversations, where its template `writes_contents_alone`."""
    speakers = [tuple(message["role"] for message in messages) for messages in conversations]
    shapes = list(dict.fromkeys(speakers))
    more = any(message.keys() != _KEYS for messages in conversations for message in messages)
    if more or any(_HEAD in role for shape in shapes for role in shape):
        return render(conversations)
    marked = [
        [{"role": role, "content": _MARK.format(i)} for i, role in enumerate(shape)] for shape in shapes
    ]
    mark = re.compile(_MARK.format(r"(\d+)"))
    between = {shape: mark.split(text) for shape, text in zip(shapes, render(marked), strict=True)}
    return [
        _filled(between[shape], messages) for shape, messages in zip(speakers, conversations, strict=True)
    ]


def _filled(parts: Sequence[str], messages: Messages) -> str:
    """A text, with the contents of messages in the places of their numbers, which are every second part."""
    return "".join(messages[int(part)]["content"] if i % 2 else part for i, part in enumerate(parts))


def _harmless(node: nodes.Node, said: set[str], place: str) -> bool:
    """Whether a node of a template, and all in it, looks at no content. said: names of single messages.

    place: `around` what is written; `written` as it is; `used` in any other way.
    """
    if isinstance(node, nodes.Getattr | nodes.Getitem):
        key = node.attr if isinstance(node, nodes.Getattr) else getattr(node.arg, "value", None)
        if _is_name(node.node, "loop"):
            return key in _LOOP
        if _is_message(node.node, said):
            return key == "role" or key == "content" and place == "written"
    if isinstance(node, nodes.Name):
        return node.name not in said | {"messages", "loop", "self"}
    if isinstance(node, nodes.Output):
        inner = "written" if place == "around" else "used"
    elif isinstance(node, nodes.Add | nodes.Concat) and place == "written":
        inner = "written"
    else:
        inner = "around" if place == "around" and isinstance(node, _AROUND) else "used"
    children = node.iter_child_nodes()
    if isinstance(node, nodes.For) and _is_name(node.iter, "messages"):
        children = node.iter_child_nodes(exclude=("target", "iter"))
    return all(_harmless(child, said, inner) for child in children)


def _is_name(node: nodes.Node, name: str) -> bool:
    return isinstance(node, nodes.Name) and node.name == name


def _is_message(node: nodes.Node, said: set[str]) -> bool:
    """Whether a node is one message: the one of a loop, or one by its number."""
    if isinstance(node, nodes.Name):
        return node.name in said
    return (
        isinstance(node, nodes.Getitem)
        and _is_name(node.node, "messages")
        and isinstance(node.arg, nodes.Const)
        and isinstance(node.arg.value, int)
    )
