// Package netavark is Podman's door: the commands that netavark, and Podman up to 5.8 itself, give a network driver plugin
// (netavark, plugin-API.md). Each is a process of its own, with JSON on its standard input and output; this package
// turns it into a call of the daemon, which it starts when there is none. Nothing is kept here between two calls.
package netavark

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/usernet/usernet/driver/control"
	"github.com/usernet/usernet/driver/held"
)

// APIVersion is the version of netavark's plugin interface.
const APIVersion = "1.0.0"

// maxInput bounds what is read, in bytes: all ports of a host, one by one, are less.
const maxInput = 16 << 20

// Plugin is one run of the plugin.
type Plugin struct {
	Version string // what info prints
	Daemon  control.Daemon

	Stdin  io.Reader
	Stdout io.Writer
}

// Commands are the first arguments that Run knows.
var Commands = []string{"create", "setup", "teardown", "info"}

// Run obeys a command line and returns the exit status. What goes wrong it tells on standard output, as the
// interface wants it.
func (p *Plugin) Run(ctx context.Context, args []string) int {
	answer, err := p.run(ctx, args)
	if err != nil {
		answer = struct {
			Error string `json:"error"`
		}{err.Error()}
	}
	if answer != nil {
		if werr := json.NewEncoder(p.Stdout).Encode(answer); werr != nil {
			return 1
		}
	}
	if err != nil {
		return 1
	}
	return 0
}

func (p *Plugin) run(ctx context.Context, args []string) (answer any, err error) {
	switch {
	case len(args) == 1 && args[0] == "info":
		return info{p.Version, APIVersion}, nil
	case len(args) == 1 && args[0] == "create":
		return p.create(ctx)
	case len(args) == 2 && args[0] == "setup":
		return p.setup(ctx, args[1])
	case len(args) == 2 && args[0] == "teardown":
		return nil, p.teardown(ctx, args[1])
	}
	return nil, fmt.Errorf("want create, setup NETNS, teardown NETNS or info, got %q", args)
}

// create checks a network that Podman is about to write down, and answers with its subnets.
func (p *Plugin) create(ctx context.Context) (any, error) {
	net, err := decode[network](p.Stdin)
	if err != nil {
		return nil, err
	}
	spec, _, err := networkSpec(net)
	if err != nil {
		return nil, err
	}
	req := control.PrepareRequest{Network: spec, Taken: takenSubnets(net.ID)}
	var got control.NetworkSpec
	err = p.Daemon.Ask(ctx, func(c *control.Client) (err error) {
		got, err = c.PrepareNetwork(ctx, req)
		return err
	})
	if err != nil {
		return nil, err
	}
	return prepared(net, got), nil
}

// setup puts a container on a network.
func (p *Plugin) setup(ctx context.Context, path string) (any, error) {
	ex, err := decode[exec](p.Stdin)
	if err != nil {
		return nil, err
	}
	if Rootless() {
		ex.PortMappings = nil // Podman has a forwarder of its own for these, which comes from inside the container
	}
	req, err := attachRequest(ex)
	if err != nil {
		return nil, err
	}
	ns, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open the container's network namespace: %w", err)
	}
	defer ns.Close()
	if req.Ports, err = heldPorts(ex.ContainerID, req.Ports); err != nil {
		return nil, err
	}
	var got control.Attached
	err = p.Daemon.Ask(ctx, func(c *control.Client) (err error) {
		got, err = c.Attach(ctx, req, ns)
		return err
	})
	if err != nil {
		return nil, err
	}
	return status(req.Interface, got)
}

// teardown takes a container off a network. Its namespace may be gone.
func (p *Plugin) teardown(ctx context.Context, path string) error {
	ex, err := decode[exec](p.Stdin)
	if err != nil {
		return err
	}
	ns, err := os.Open(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("open the container's network namespace: %w", err)
	}
	if ns != nil {
		defer ns.Close()
	}
	return p.Daemon.Ask(ctx, func(c *control.Client) error {
		return c.Detach(ctx, ex.Network.ID, endpointID(ex), ns)
	})
}

// heldPorts marks the ports that rootful Podman holds for the container.
func heldPorts(containerID string, ports []control.Port) ([]control.Port, error) {
	if len(ports) == 0 || os.Geteuid() != 0 || Rootless() {
		return ports, nil
	}
	// Podman runs netavark, which runs us.
	podman, err := held.Parent(os.Getppid())
	if err != nil {
		return nil, err
	}
	return held.Ports(containerID, podman, ports)
}

func decode[T any](r io.Reader) (v T, err error) {
	text, err := io.ReadAll(io.LimitReader(r, maxInput+1))
	if err != nil {
		return v, fmt.Errorf("read standard input: %w", err)
	}
	if len(text) > maxInput {
		return v, fmt.Errorf("read standard input: more than %d bytes", maxInput)
	}
	if err := json.Unmarshal(text, &v); err != nil {
		return v, fmt.Errorf("read standard input: %w", err)
	}
	return v, nil
}
