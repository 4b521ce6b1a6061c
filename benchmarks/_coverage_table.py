def table(rows, graph_only=False): return ""
def summary(rows, graph_only=False): return ""
