package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"syscall"

	"github.com/usernet/usernet"
)

// Client talks to a daemon over its control socket.
type Client struct {
	path   string
	userns string // where the caller is; "": it does not matter
	http   http.Client
}

// NewClient makes a client for the socket at path. It connects with the first call.
func NewClient(path string) *Client {
	return (&Client{path: path}).passing(nil)
}

// passing is a client that passes file with its next request; nil passes nothing.
func (c *Client) passing(file *os.File) *Client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		conn, err := new(net.Dialer).DialContext(ctx, "unix", c.path)
		if err != nil || file == nil {
			return conn, err
		}
		return &passingConn{conn.(*net.UnixConn), file}, nil
	}
	return &Client{path: c.path, userns: c.userns, http: http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}}
}

// Networks lists the daemon's networks with all that is on them.
func (c *Client) Networks(ctx context.Context) ([]Network, error) {
	var list []Network
	return list, c.call(ctx, http.MethodGet, "networks", nil, &list)
}

// NetworksIn lists the networks that have endpoints in a namespace, with these endpoints only.
func (c *Client) NetworksIn(ctx context.Context, netns *os.File) ([]Network, error) {
	var list []Network
	return list, c.passing(netns).call(ctx, http.MethodGet, "networks", nil, &list)
}

// RemoveNetwork removes a network that the engine has forgotten. id may be the beginning of the ID.
func (c *Client) RemoveNetwork(ctx context.Context, id string) error {
	return c.call(ctx, http.MethodDelete, "networks/"+url.PathEscape(id), nil, nil)
}

// AddPorts publishes ports of a running container and returns them with the host ports that were chosen. endpoint is
// the beginning of an endpoint's ID or one of its addresses.
func (c *Client) AddPorts(ctx context.Context, endpoint string, ports []usernet.Port) ([]usernet.Port, error) {
	var res portsBody
	err := c.call(ctx, http.MethodPost, "endpoints/"+url.PathEscape(endpoint)+"/ports", portsBody{portsOf(ports)}, &res)
	return portValues(res.Ports), err
}

// RemovePorts releases published ports of a container.
func (c *Client) RemovePorts(ctx context.Context, endpoint string, ports []usernet.Port) error {
	return c.call(ctx, http.MethodDelete, "endpoints/"+url.PathEscape(endpoint)+"/ports", portsBody{portsOf(ports)}, nil)
}

func (c *Client) call(ctx context.Context, method, path string, req, res any) error {
	var body io.Reader
	if req != nil {
		text, err := json.Marshal(req)
		if err != nil {
			return err
		}
		body = bytes.NewReader(text)
	}
	r, err := http.NewRequestWithContext(ctx, method, "http://usernet/v1/"+path, body)
	if err != nil {
		return err
	}
	if c.userns != "" {
		r.Header.Set(callersNamespace, c.userns)
	}
	resp, err := c.http.Do(r)
	if errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.ECONNREFUSED) {
		return &absentError{c.path}
	}
	if errors.Is(err, syscall.EACCES) {
		return fmt.Errorf("connect to the daemon at %s: %w (only root may)", c.path, syscall.EACCES)
	}
	if err != nil {
		return fmt.Errorf("ask the daemon: %w", err)
	}
	defer resp.Body.Close()
	if pid, err := strconv.Atoi(resp.Header.Get(leavingProcess)); err == nil {
		return &leavingError{pid}
	}
	if resp.StatusCode != http.StatusOK {
		var e errorBody
		if err := json.NewDecoder(resp.Body).Decode(&e); err != nil || e.Error == "" {
			return fmt.Errorf("ask the daemon: %s", resp.Status)
		}
		return &refusal{e.Error, kinds[e.Kind]}
	}
	if res == nil {
		return nil
	}
	if err := json.NewDecoder(resp.Body).Decode(res); err != nil {
		return fmt.Errorf("read the daemon's answer: %w", err)
	}
	return nil
}

// ErrAbsent is in the chain of the error of a call that found no daemon.
var ErrAbsent = errors.New("no usernet daemon")

// unstartable is why there is no daemon still.
type unstartable struct{ error }

func (u unstartable) Unwrap() []error { return []error{u.error, ErrAbsent} }

type absentError struct{ path string }

func (e *absentError) Error() string {
	return fmt.Sprintf("no usernet daemon answers at %s: is usernet serve running, and with this --control-socket?", e.path)
}

func (e *absentError) Unwrap() error { return ErrAbsent }
