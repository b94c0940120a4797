// Nodes. What a model wrote becomes text of one or the value of an input, never markup.

export const byId = (id) => document.getElementById(id);

export function el(tag, css, ...children) {
  const node = document.createElement(tag);
  if (css) node.className = css;
  node.append(...children);
  return node;
}
