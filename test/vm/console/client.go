package console

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"syscall"
)

// ErrEnded says that the serial port ended, because the machine did.
var ErrEnded = errors.New("the machine has ended")

// ErrCommand is in the chain of the error of a command that ran and failed.
var ErrCommand = errors.New("command failed")

// Client is the host's end of a serial port.
type Client struct {
	port io.ReadWriteCloser
	up   chan struct{} // closed when the guest says so
	done chan struct{} // closed when the port has ended

	mu     sync.Mutex // also for writing
	last   int
	called map[int]*Process
}

// NewClient makes a client of a port, which is the client's from then on. Nothing is read before Run.
func NewClient(port io.ReadWriteCloser) *Client {
	return &Client{port: port, up: make(chan struct{}), done: make(chan struct{}), called: make(map[int]*Process)}
}

// Run reads what the guest says until the port ends or ctx does; then every command has ended too, as far as its callers see.
func (c *Client) Run(ctx context.Context) error {
	defer close(c.done)
	defer context.AfterFunc(ctx, func() { c.port.Close() })()
	err := c.read()
	if ctx.Err() != nil || ended(err) {
		return nil
	}
	return fmt.Errorf("read from the serial port: %w", err)
}

// ended tells whether an error of the port says that the machine has ended, perhaps with something unread.
func ended(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, net.ErrClosed)
}

func (c *Client) read() error {
	for from := json.NewDecoder(c.port); ; {
		var a answer
		if err := from.Decode(&a); err != nil {
			return err
		}
		if a.ID == 0 {
			close(c.up)
			continue
		}
		c.mu.Lock()
		p := c.called[a.ID]
		if a.Ended {
			delete(c.called, a.ID)
		}
		c.mu.Unlock()
		switch {
		case p == nil:
			return fmt.Errorf("answer to %d, which nobody asked", a.ID)
		case a.Ended:
			p.end = a
			close(p.ended)
		default:
			close(p.started)
		}
	}
}

// Up waits until the guest takes commands.
func (c *Client) Up(ctx context.Context) error {
	select {
	case <-c.up:
		return nil
	case <-c.done:
		return ErrEnded
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Process is a command in the guest.
type Process struct {
	client  *Client
	id      int
	line    string
	started chan struct{}
	ended   chan struct{}
	end     answer // when ended is closed
}

// Start starts a command and waits until it runs; ctx bounds that.
func (c *Client) Start(ctx context.Context, command Command) (*Process, error) {
	p := &Process{client: c, line: strings.Join(command.Args, " "), started: make(chan struct{}), ended: make(chan struct{})}
	c.mu.Lock()
	c.last++
	p.id = c.last
	c.called[p.id] = p
	err := json.NewEncoder(c.port).Encode(request{ID: p.id, Command: &command})
	c.mu.Unlock()
	if ended(err) {
		<-c.done
		err = ErrEnded
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", p.line, err)
	}
	select {
	case <-p.started:
		return p, nil
	case <-p.ended:
		select {
		case <-p.started: // it was short
			return p, nil
		default:
			return nil, fmt.Errorf("%s: %s", p.line, p.end.Fault)
		}
	case <-c.done:
		return nil, fmt.Errorf("%s: %w", p.line, ErrEnded)
	case <-ctx.Done():
		return nil, fmt.Errorf("%s: %w", p.line, ctx.Err())
	}
}

// Ended is closed when the process has ended.
func (p *Process) Ended() <-chan struct{} { return p.ended }

// Signal sends the process a signal. One that has ended, or whose machine has, is no error.
func (p *Process) Signal(sig syscall.Signal) error {
	p.client.mu.Lock()
	err := json.NewEncoder(p.client.port).Encode(request{ID: p.id, Signal: int(sig)})
	p.client.mu.Unlock()
	if ended(err) {
		<-p.client.done
		return nil
	}
	return err
}

// Wait waits for the process and returns its standard output without the last newline. When ctx ends before that, the process
// is killed.
func (p *Process) Wait(ctx context.Context) (string, error) {
	select {
	case <-p.ended:
	case <-p.client.done:
		return "", fmt.Errorf("%s: %w", p.line, ErrEnded)
	case <-ctx.Done():
		return "", errors.Join(fmt.Errorf("%s: %w", p.line, ctx.Err()), p.Signal(syscall.SIGKILL))
	}
	out := strings.TrimSuffix(string(p.end.Out), "\n")
	if p.end.Fault != "" {
		return out, fmt.Errorf("%s: %w: %s: %s", p.line, ErrCommand, p.end.Fault, strings.TrimSpace(string(p.end.Err)))
	}
	return out, nil
}

// Do runs a command to its end.
func (c *Client) Do(ctx context.Context, command Command) (string, error) {
	p, err := c.Start(ctx, command)
	if err != nil {
		return "", err
	}
	return p.Wait(ctx)
}
