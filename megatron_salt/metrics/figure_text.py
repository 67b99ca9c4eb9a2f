"""A figure as text."""


def figure_text(value: float) -> str:
    """Four digits after the point, or four digits in all of what is large: a perplexity may have hundreds of them."""
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4g}"
