# Two things come out of this file:
#
#	docker build -t usernet .                            an image with usernet and iptables
#	docker build --target plugin --output plugin .       the directory for docker plugin create
#
# IPTABLES is the kind of iptables that the host uses: iptables-nft or iptables-legacy.
FROM golang:1.26-bookworm AS build
RUN apt-get update && apt-get install -y --no-install-recommends iptables && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
ARG VERSION=
ARG IPTABLES=iptables-nft
RUN dist/plugin.sh /plugin

FROM scratch AS plugin
COPY --from=build /plugin /

# To be run with --network host --privileged, the host's /run/docker/plugins and /var/lib/usernet as volumes, and its
# /run/usernet as a volume with the option rshared: the namespaces that are pinned there must outlive the container.
FROM scratch
COPY --from=build /plugin/rootfs /
ENTRYPOINT ["/usr/bin/usernet"]
CMD ["serve"]
