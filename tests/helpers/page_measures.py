"""What is measured of a page that is open in a browser: its width, its contrasts, what is empty or has no name."""

# A function's body: what is measured of the page that is open.
MEASURE = """
const rgb = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
const blend = (top, below, opacity) => [0, 1, 2].map((i) => opacity * top[i] + (1 - opacity) * below[i]);
const luminance = (color) => color.slice(0, 3)
  .map((value) => value / 255)
  .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4))
  .reduce((sum, value, i) => sum + value * [0.2126, 0.7152, 0.0722][i], 0);
const contrast = (a, b) => {
  const [high, low] = [luminance(a), luminance(b)].sort((x, y) => y - x);
  return (high + 0.05) / (low + 0.05);
};
const behind = (element) => {
  for (let at = element; at; at = at.parentElement) {
    const color = rgb(getComputedStyle(at).backgroundColor);
    if (color.length === 3 || color[3] > 0) return color;
  }
  return [255, 255, 255];
};
const faint = [];
const outside = [];
for (const element of document.querySelectorAll('body *')) {
  const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  if (!own || !element.getClientRects().length || element.closest('script, title')) continue;
  const svg = element.closest('svg');
  let back = behind(element);
  if (element.classList.contains('cell-number')) {
    const cell = element.previousElementSibling;
    back = blend(rgb(getComputedStyle(cell).fill), back, Number(cell.getAttribute('fill-opacity')));
  }
  const color = rgb(getComputedStyle(element)[svg ? 'fill' : 'color']);
  if (contrast(color, back) < 4.5) faint.push([element.outerHTML.slice(0, 120), contrast(color, back)]);
  const [inner, outer] = [element.getBoundingClientRect(), (svg || document.body).getBoundingClientRect()];
  const far = inner.left < outer.left - 1 || inner.right > outer.right + 1 || inner.bottom > outer.bottom + 1;
  if (svg && far) outside.push(element.outerHTML.slice(0, 120));
}
return {
  inner: innerWidth,
  scroll: document.documentElement.scrollWidth,
  client: document.documentElement.clientWidth,
  background: getComputedStyle(document.body).backgroundColor,
  resources: performance.getEntriesByType('resource').map((entry) => entry.name),
  sections: Object.fromEntries([...document.querySelectorAll('section')].map((section) =>
    [section.getAttribute('aria-labelledby'), [section.offsetWidth, section.offsetHeight]])),
  empty: [...document.querySelectorAll('figure, .bar span, .flow li, table')]
    .filter((each) => !each.offsetWidth || !each.offsetHeight).map((each) => each.outerHTML.slice(0, 120)),
  unnamed: [...document.querySelectorAll('[role=img], [role=region]')]
    .filter((each) => !each.getAttribute('aria-label')
      && !document.getElementById(each.getAttribute('aria-labelledby'))).map((each) => each.outerHTML.slice(0, 120)),
  faint, outside,
  text: document.body.innerText,
};
"""
