package driver

import (
	"errors"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/internal/undo"
	"github.com/usernet/usernet/portmap"
	"github.com/usernet/usernet/vsock/publish"
)

// asker has the host of this machine publish a port that is published here.
type asker func(p usernet.Port, f *portmap.Forward) (*publish.Published, error)

// beyond is for ports that are new: the host has them, or nobody has.
func (d *Driver) beyond(p usernet.Port, f *portmap.Forward) (*publish.Published, error) {
	return d.cfg.HostGateway.Publish(d.ctx, p, f.Accept)
}

// keepBeyond is for ports that containers have already: the host has them as soon as it can.
func (d *Driver) keepBeyond(p usernet.Port, f *portmap.Forward) (*publish.Published, error) {
	return d.cfg.HostGateway.Keep(p, f.Accept), nil
}

// beyondTries bounds how often a free port of ours may turn out taken on the host.
const beyondTries = 64

// take publishes a port here and, if there is a gateway to it, on the host: want as the engine means it, req as it is to be here.
// Both have the same number, so what is free here and not there is given back for the next one.
func (d *Driver) take(req portmap.Request, want usernet.Port, ask asker) (*portmap.Forward, *publish.Published, error) {
	if d.cfg.HostGateway == nil || req.Port.Proto == usernet.SCTP {
		f, err := d.mapper.Publish(req)
		return f, nil, err
	}
	// What we chose in vain stays ours until the end, or we would choose the same again.
	var spoiled undo.List
	defer spoiled.Close()
	var there error
	for range beyondTries {
		f, err := d.mapper.Publish(req)
		if err != nil {
			if there != nil && errors.Is(err, usernet.ErrPortTaken) {
				return nil, nil, there // the others of the range are taken here
			}
			return nil, nil, err
		}
		wish := want
		if !want.Held {
			wish.HostPort, wish.HostPortEnd = f.Port().HostPort, 0
		}
		b, err := ask(wish, f)
		if err == nil {
			return f, b, nil
		}
		spoiled.Push(f.Close)
		there = err
		if !errors.Is(err, usernet.ErrPortTaken) || want.Held {
			break
		}
		if req.Port.HostPort != 0 {
			if wish.HostPort >= req.Port.HostPortEnd {
				break
			}
			req.Port.HostPort = wish.HostPort + 1
		}
	}
	return nil, nil, errors.Join(there, spoiled.Close())
}
