// Package load is the benchmark's load. An Agent is one process in the network namespace under measurement: it serves
// one end of every load and drives the other, over TCP, UDP and ICMP, and counts what arrives. A Remote commands it by
// a unix socket, which no network namespace hides. The package knows nothing of who forwards the load.
package load

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/rpc"
	"os"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sync/errgroup"
)

// Kind is what a job does.
type Kind string

// The kinds of load. Up is from the driving agent to the serving one.
const (
	TCPUp       Kind = "tcp up"
	TCPDown     Kind = "tcp down"
	TCPEcho     Kind = "tcp echo"     // one byte there and back, again and again
	TCPConnect  Kind = "tcp connect"  // a connection, one byte each way, and its end
	UDPUp       Kind = "udp up"       // datagrams of Datagram bytes as fast as they can be written
	UDPDown     Kind = "udp down"     // the same from the serving agent
	UDPExchange Kind = "udp exchange" // datagrams of small bytes there and back
	Ping        Kind = "ping"
)

// Job is one load.
type Job struct {
	Kind    Kind
	Addr    netip.AddrPort // of the serving agent; of Ping only the address counts
	Length  time.Duration
	Streams int    // TCP: connections at the same time; UDPExchange: datagrams under way at the same time
	ID      uint64 // of TCPUp and UDPUp: what the serving agent counts under; unique in a run
}

// Result is what the driving agent saw. Of TCPUp and UDPUp, Remote.Received of the serving agent has the figures.
type Result struct {
	Bytes    int64
	Done     int // round trips, connections or datagrams
	Failed   int // connections that were not made or broke
	Failure  string
	Elapsed  time.Duration
	P50, P99 time.Duration // of a round trip
}

// Rate is how many were done a second.
func (r Result) Rate() float64 { return float64(r.Done) / r.Elapsed.Seconds() }

// Gbits is Gbit/s of payload.
func (r Result) Gbits() float64 { return float64(r.Bytes) * 8 / r.Elapsed.Seconds() / 1e9 }

// Place is where an agent runs.
type Place struct {
	PID     int // as the agent's own process namespace has it
	Gateway netip.Addr
}

// Agent serves loads and drives them.
type Agent struct {
	counts tallies
	held   holding
}

// Serve answers a Remote at the unix socket control and loads at the address listen until ctx ends. The socket's file
// may be there from an earlier agent.
func Serve(ctx context.Context, control string, listen netip.AddrPort) error {
	a := &Agent{}
	defer a.held.release()
	s, err := newServer(listen, &a.counts)
	if err != nil {
		return err
	}
	if err := os.Remove(control); err != nil && !errors.Is(err, os.ErrNotExist) {
		return errors.Join(err, s.close())
	}
	l, err := net.Listen("unix", control)
	if err != nil {
		return errors.Join(err, s.close())
	}
	r := rpc.NewServer()
	if err := r.Register(a); err != nil {
		return errors.Join(err, l.Close(), s.close())
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return s.run(ctx) })
	g.Go(func() error { return command(ctx, l, r) })
	return g.Wait()
}

// command serves the Remotes that connect to l.
func command(ctx context.Context, l net.Listener, r *rpc.Server) error {
	defer context.AfterFunc(ctx, func() { l.Close() })()
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		c, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		wg.Go(func() {
			defer context.AfterFunc(ctx, func() { c.Close() })()
			r.ServeConn(c)
		})
	}
}

// Place tells where the agent runs.
func (a *Agent) Place(_ struct{}, p *Place) error {
	p.PID = os.Getpid()
	routes, err := netlink.RouteList(nil, netlink.FAMILY_V4)
	if err != nil {
		return fmt.Errorf("list routes: %w", err)
	}
	for _, r := range routes {
		if r.Gw != nil && (r.Dst == nil || r.Dst.IP.IsUnspecified()) {
			gw, _ := netip.AddrFromSlice(r.Gw)
			p.Gateway = gw.Unmap()
		}
	}
	return nil
}

// Drive does a job.
func (a *Agent) Drive(j Job, r *Result) error {
	do := map[Kind]func(Job) (Result, error){
		TCPUp: tcpUp, TCPDown: tcpDown, TCPEcho: tcpEcho, TCPConnect: tcpConnect,
		UDPUp: udpUp, UDPDown: udpDown, UDPExchange: udpExchange, Ping: ping,
	}[j.Kind]
	if do == nil {
		return fmt.Errorf("no load %q", j.Kind)
	}
	var err error
	if *r, err = do(j); err != nil {
		return fmt.Errorf("%s %s: %w", j.Kind, j.Addr, err)
	}
	return nil
}

// Received waits until the window of a TCPUp or UDPUp that came in is over and tells what arrived in it.
func (a *Agent) Received(j Job, r *Result) error {
	var err error
	*r, err = a.counts.wait(j.ID, j.Length+5*time.Second)
	return err
}

// Hold opens j.Streams connections, sends one byte there and back on each, and keeps them open. Result.Done says how many
// it was within j.Length; what went wrong with the next ones, Result.Failure, is no error.
func (a *Agent) Hold(j Job, r *Result) error {
	start := time.Now()
	*r = a.held.open(j)
	r.Elapsed = time.Since(start)
	return nil
}

// Release ends what Hold keeps open.
func (a *Agent) Release(_ struct{}, _ *struct{}) error {
	a.held.release()
	return nil
}
