"""The method itself: algebra, graph, sites, plans, policies, fits and costs. Needs torch alone."""
