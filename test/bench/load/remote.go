package load

import (
	"context"
	"fmt"
	"net"
	"net/rpc"
	"time"
)

// Remote commands an Agent.
type Remote struct{ c *rpc.Client }

// Dial connects to the agent at the unix socket control.
func Dial(ctx context.Context, control string) (*Remote, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", control)
	if err != nil {
		return nil, err
	}
	return &Remote{rpc.NewClient(c)}, nil
}

// Close lets go of the agent.
func (r *Remote) Close() error { return r.c.Close() }

// grace is what a job may take beyond its length.
const grace = 15 * time.Second

func call[Req, Res any](ctx context.Context, r *Remote, method string, timeout time.Duration, req Req) (res Res, err error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	select {
	case done := <-r.c.Go("Agent."+method, req, &res, make(chan *rpc.Call, 1)).Done:
		return res, done.Error
	case <-ctx.Done():
		var none Res // the answer may still come, into res
		return none, fmt.Errorf("%s: %w", method, ctx.Err())
	}
}

// Place tells where the agent runs.
func (r *Remote) Place(ctx context.Context) (Place, error) {
	return call[struct{}, Place](ctx, r, "Place", grace, struct{}{})
}

// Drive has the agent do a job.
func (r *Remote) Drive(ctx context.Context, j Job) (Result, error) {
	return call[Job, Result](ctx, r, "Drive", j.Length+grace, j)
}

// Received tells what of a TCPUp or UDPUp arrived at the agent in j.Length from its first byte on.
func (r *Remote) Received(ctx context.Context, j Job) (Result, error) {
	return call[Job, Result](ctx, r, "Received", j.Length+grace, j)
}

// Hold has the agent open connections and keep them, for at most j.Length, until Release.
func (r *Remote) Hold(ctx context.Context, j Job) (Result, error) {
	return call[Job, Result](ctx, r, "Hold", j.Length+grace, j)
}

// Release ends what Hold keeps open.
func (r *Remote) Release(ctx context.Context) error {
	_, err := call[struct{}, struct{}](ctx, r, "Release", grace, struct{}{})
	return err
}
