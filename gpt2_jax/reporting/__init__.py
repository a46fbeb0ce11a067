"""Reports as HTML pages: plots as data, their drawings, and the page. It depends on no particular report."""
