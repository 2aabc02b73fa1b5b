"""The page's style sheet."""

from __future__ import annotations

from ezsd.pipeline.inference.visualize import BASE_COLOUR, NOVEL_COLOUR


def style_sheet() -> str:
    """The style sheet with the colours of base and novel classes."""
    return _STYLE.replace("BASE_COLOUR", BASE_COLOUR).replace("NOVEL_COLOUR", NOVEL_COLOUR)


_STYLE = """
:root{color-scheme:light dark;--paper:#fff;--sheet:#f6f7f9;--ink:#1a1d21;--soft:#5d6672;--rule:#d9dde3;
--base:BASE_COLOUR;--novel:NOVEL_COLOUR;--base-tint:#d8efe0;--novel-tint:#f9dbeb;--all-tint:#e4e8ee;
--run-0:#1f5fd0;--run-1:#d06a00;--run-2:#6d7580;--run-3:#7a3fc4;--run-4:#00857a;--run-5:#a8322a}
@media(prefers-color-scheme:dark){:root{--paper:#14171b;--sheet:#1d2127;--ink:#e8ebef;--soft:#9aa4b1;--rule:#363d47;
--base-tint:#173a28;--novel-tint:#4a1a36;--all-tint:#2a3038;
--run-0:#7aa8ff;--run-1:#ffad5c;--run-2:#a5aeba;--run-3:#c09bff;--run-4:#4fd1c5;--run-5:#ff8a80}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,sans-serif}
main{max-width:1160px;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:2.2rem;line-height:1.15;margin:.1rem 0 .6rem;overflow-wrap:anywhere}
h2{font-size:1.35rem;margin:0 0 .25rem}
h3{font-size:.95rem;margin:0 0 .5rem}
section,footer{margin-top:3rem}
.eyebrow{margin:0;color:var(--soft);font-size:.85rem;letter-spacing:.06em;text-transform:uppercase}
.lead{max-width:46rem;margin:0 0 1rem;color:var(--soft)}
header .lead{font-size:1.1rem;color:var(--ink)}
.badge{display:inline-block;margin:0 .6rem .3rem 0;padding:.15rem .65rem;border-radius:1rem;
background:var(--all-tint);font-size:.85rem}
.legend{display:inline-block;margin-right:1rem;font-size:.85rem;color:var(--soft)}
.key{display:inline-block;width:.8em;height:.8em;margin-right:.4em;border-radius:2px}
.key.base,.fill.base{background:var(--base)}
.key.novel,.fill.novel{background:var(--novel)}
.note{padding:.6rem .9rem;border-left:3px solid var(--soft);background:var(--sheet);overflow-wrap:anywhere}
code{font:.87em ui-monospace,monospace}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.45rem .9rem;border-bottom:1px solid var(--rule);text-align:right;font-weight:400;vertical-align:top}
thead th{color:var(--soft);font-size:.85rem}
th:first-child{padding-left:0;text-align:left}
tbody th{overflow-wrap:anywhere}
small{display:block;color:var(--soft);font-size:.8rem}
.results{width:100%}
.results tbody td{width:17%;font-size:1.45rem;
background:linear-gradient(var(--tint),var(--tint)) left bottom/var(--part) 100% no-repeat}
.results td.base{--tint:var(--base-tint)}
.results td.novel,.results td.novel_alone{--tint:var(--novel-tint)}
.results td.all{--tint:var(--all-tint)}
.columns,.charts{display:grid;gap:1.5rem 2.5rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,290px),1fr))}
.class{display:grid;grid-template-columns:7.5rem 1fr 3rem;gap:.6rem;align-items:center;font-size:.88rem}
.class .name{overflow-wrap:anywhere}
.class .value{text-align:right;font-variant-numeric:tabular-nums}
.track{position:relative;height:.8rem;background:var(--sheet)}
.fill{position:absolute;inset:0 auto 0 0}
.mark{position:absolute;top:-2px;bottom:-2px;width:2px;background:var(--ink)}
figure{margin:0}
.chart svg{display:block;width:100%;height:auto;stroke-linejoin:round}
.chart svg text{font-family:inherit!important}
figcaption{color:var(--soft);font-size:.85rem;overflow-wrap:anywhere}
.chart figcaption{text-align:center}
.gallery{display:grid;gap:1.5rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,500px),1fr))}
.pair figcaption{margin-bottom:.4rem}
.pair{padding:.75rem;border:1px solid var(--rule);border-radius:8px;background:var(--sheet)}
.panels{display:grid;gap:.75rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,220px),1fr))}
.panels img{display:block;width:100%;height:auto;border-radius:4px}
.panels p{margin:.25rem 0 0;font-size:.85rem;text-align:center}
details{margin-top:1.5rem}
summary{margin-bottom:1rem;cursor:pointer;color:var(--soft)}
footer{padding-top:1.5rem;border-top:1px solid var(--rule);font-size:.9rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.25rem 1.25rem;margin:1rem 0}
dt{color:var(--soft)}
dd{margin:0;overflow-wrap:anywhere}
pre{padding:.9rem;background:var(--sheet);border-radius:8px;white-space:pre-wrap;overflow-wrap:anywhere}
@media(max-width:560px){main{padding:1.5rem 1rem 3rem}h1{font-size:1.7rem}th,td{padding:.4rem .5rem}
.results tbody td{font-size:1.1rem}dl{grid-template-columns:1fr}dt{margin-top:.4rem}}
"""
