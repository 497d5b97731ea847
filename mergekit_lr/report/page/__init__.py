"""A manifest or a comparison as one HTML page that needs no network: totals, figures, and every figure as a table.

``manifests`` says what is read of ``lrmerge.json``, ``content`` brings all verbs into one form, ``charts`` draws, and
``html`` writes. Figures are Vega-Lite, by Altair: of the plotting libraries that work offline it draws SVG, whose marks
a page can style for light, dark and paper, and its runtime is the smallest (0.9 MB; Plotly's is 4.5 MB, Bokeh draws on
a canvas).
"""
