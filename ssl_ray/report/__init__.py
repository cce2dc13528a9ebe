"""From MLflow alone: does pretraining help, and at how many labelled volumes?"""
