"""The look of the report: one style sheet for light, dark, wide and narrow. Knows class names, no content."""

CSS = """
:root{color-scheme:light dark;--paper:#fbfaf8;--ink:#1c1b19;--soft:#66625b;--rule:#dcd8d0;--panel:#f3f0ea;
--gguf:#2b6cb0;--onnx:#c05621;--torch:#57534b;--other:#7c6a9c;--hatch:#a8a297}
@media(prefers-color-scheme:dark){:root{--paper:#171614;--ink:#ece8e1;--soft:#a49e93;--rule:#35322d;
--panel:#201e1b;--gguf:#6aa9e9;--onnx:#f0925a;--torch:#b5aea2;--other:#b7a3dd;--hatch:#6f695f}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;-webkit-text-size-adjust:100%}
main{max-width:1160px;margin:0 auto;padding:40px 20px 64px}
h1{font-size:clamp(1.5rem,4.5vw,2.1rem);line-height:1.2;margin:0 0 6px;letter-spacing:-.015em}
h2{font-size:1.15rem;margin:44px 0 12px}
h3{font-size:.95rem;margin:24px 0 8px}
.kicker{margin:0 0 8px;font-size:.8rem;letter-spacing:.09em;text-transform:uppercase;color:var(--onnx);
font-weight:600}
.sub,.note,figcaption{color:var(--soft);font-size:.88rem}
.sub{margin:0 0 24px}
.finding{margin:0 0 4px}
.scroll{overflow-x:auto;margin:24px 0 0}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:9px 8px;text-align:right;border-bottom:1px solid var(--rule);white-space:nowrap}
thead th{color:var(--soft);font-weight:500;font-size:.8rem;white-space:normal;vertical-align:bottom;
min-width:62px}
th:first-child{text-align:left;position:sticky;left:0;padding-left:0;background:var(--paper);
font-weight:600}
thead th:first-child{font-weight:500}
td span[title]{text-decoration:underline dotted var(--hatch);text-underline-offset:3px;cursor:help}
tr.published th,tr.published td{color:var(--soft);font-weight:400;
background:repeating-linear-gradient(135deg,var(--panel) 0 6px,var(--paper) 6px 12px)}
tr.failed td{text-align:left;white-space:normal;color:var(--onnx)}
.badge{display:inline-block;margin-left:8px;padding:0 7px;border:1px solid var(--hatch);border-radius:9px;
font-size:.72rem;font-weight:500;background:var(--paper)}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:36px 44px;
margin-top:40px}
figure{margin:0}
figcaption{margin-top:8px}
figure h3{margin:0 0 10px}
svg{display:block;width:100%;height:auto}
svg text{font:13px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;fill:var(--ink)}
svg .tick,svg .axis{fill:var(--soft)}
svg .strong{font-weight:600}
svg .grid{stroke:var(--rule);stroke-width:1}
.is-gguf{fill:var(--gguf)}.is-onnx{fill:var(--onnx)}.is-torch{fill:var(--torch)}.is-other{fill:var(--other)}
svg .light{opacity:.38}
svg .published{fill:url(#hatch)}.hatch-paper{fill:var(--panel)}.hatch-line{fill:var(--hatch)}
blockquote{margin:0 0 16px;padding:2px 0 2px 16px;border-left:3px solid var(--onnx);white-space:pre-wrap}
dl{margin:0}
.answers{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:18px 28px}
.answers dt{font-weight:600;font-size:.9rem}
.answers dd{margin:4px 0 0;padding:10px 14px;background:var(--panel);border-radius:6px;white-space:pre-wrap;
overflow-wrap:anywhere}
.facts{display:grid;grid-template-columns:max-content 1fr;gap:6px 20px;font-size:.9rem}
.facts dt{color:var(--soft)}
.facts dd{margin:0;overflow-wrap:anywhere}
pre{margin:0;padding:12px 14px;background:var(--panel);border-radius:6px;overflow-x:auto;font-size:.84rem}
@media(max-width:560px){main{padding:24px 16px 48px}
th:first-child{min-width:112px;white-space:normal}
.badge{margin-left:0}.facts{grid-template-columns:1fr;gap:2px}.facts dd{margin-bottom:8px}}
"""
