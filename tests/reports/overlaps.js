// What is drawn of a chart and where: texts that lie outside it, or over each other.
const places = '.xtitle, .ytitle, .xtick text, .ytick text, .shape-label text, .shapelayer text';
const found = [];
for (const panel of document.querySelectorAll('section.panel')) {
  const chart = panel.querySelector('.chart');
  if (!chart || panel.id === 'modules') continue;
  const whole = chart.getBoundingClientRect();
  const texts = [...chart.querySelectorAll(places)]
    .filter((text) => text.textContent)
    .map((text) => [text.textContent, text.getBoundingClientRect()]);
  for (const [name, box] of texts) {
    if (box.left < whole.left - 1 || box.right > whole.right + 1) found.push(`${panel.id}: ${name} is cut`);
  }
  texts.forEach(([name, box], index) => texts.slice(index + 1).forEach(([other, its]) => {
    const across = Math.min(box.right, its.right) - Math.max(box.left, its.left);
    const down = Math.min(box.bottom, its.bottom) - Math.max(box.top, its.top);
    if (across > 2 && down > 2) found.push(`${panel.id}: ${name} over ${other}`);
  }));
  const legend = panel.querySelector('.legend');
  if (legend && legend.getBoundingClientRect().top < whole.bottom - 1) found.push(`${panel.id}: legend`);
  const bar = chart.querySelector('.modebar');
  if (bar && bar.getBoundingClientRect().width) {
    const its = bar.getBoundingClientRect();
    for (const [name, box] of texts) {
      if (Math.min(box.right, its.right) - Math.max(box.left, its.left) > 1
          && Math.min(box.bottom, its.bottom) - Math.max(box.top, its.top) > 1) found.push(`${panel.id}: ${name} under the toolbar`);
    }
  }
}
return [found, document.documentElement.scrollWidth];
