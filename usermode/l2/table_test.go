//go:build unix

package l2

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"
)

// clocked is a table with ports that do nothing, and a clock that stands.
type clocked struct {
	table
	at    time.Duration
	ports map[string]*Port
}

func newClocked(limit int) *clocked {
	c := &clocked{at: time.Hour, ports: make(map[string]*Port)}
	c.table = table{limit: limit, quiet: quietAfter, entries: make(map[MAC]*entry), now: func() time.Duration { return c.at }}
	return c
}

func (c *clocked) begin(name string) *Port {
	c.at++
	p := &Port{Name: name, began: c.at, queue: newQueue(nil, 0)}
	c.ports[name] = p
	return p
}

// say has a port send from mac, and tells whether it may.
func (c *clocked) say(p *Port, mac MAC) bool {
	c.at++
	p.heard.Store(int64(c.at))
	return c.learn(p, mac)
}

// TestWhoseAddress plays the rule through: "a+" begins a, "a" sends from the address and may, "!a" may not, "a." is that a says something
// else, "a-" its end, "5s" passes; "=a" is who has the address, "=a<b,c" with its earlier holders.
func TestWhoseAddress(t *testing.T) {
	for _, tt := range []struct{ name, play string }{
		{"back at once, whatever the old connection has said", "a+ a a a b+ b =b<a a- =b b c+ c =c<b"},
		{"back at once, though the old connection has been silent for long", "a+ a 5s b+ b =b<a b"},
		{"the old connection had more in its buffers", "a+ a b+ a. !b 999ms !b 1ms b =b<a"},
		{"and after the new one was heard", "a+ a b+ b a =a !b 1s b =b<a a- b c+ c =c<b"},
		{"a thief beside one who talks", "a+ a b+ a. !b a !b 900ms a !b =a"},
		{"a thief beside one who answers", "a+ a b+ b =b<a a =a !b"},
		{"a thief who comes again at once", "a+ a b+ b a b- =a c+ !c d+ !d a"},
		{"a thief who waits must wait longer", "a+ a b+ b a 1s b a 1s !b 1s b a 2s !b 2s b a 4s !b"},
		{"not for ever", "a+ a b+ b a 1m b a 1m b a 1m b a 1m b a 1m b a 1m b a 1m b a 1m b"},
		{"nor after the end", "a+ a b+ b a a- =- b c+ c"},
		{"an older port is not one that has come back", "a+ b+ b a. 1h !a =b"},
		{"a thief leaves", "a+ a b+ b b- =a a"},
		{"two connections die", "a+ a b+ b c+ c =c<a,b a- =c<b b- =c"},
		{"the first of three is there", "a+ a b+ b c+ c a =a !b !c"},
		{"the second of three is there", "a+ a b+ b c+ c b =b<a !c a =a"},
		{"the thieves leave one after the other", "a+ a b+ b c+ c c- =b<a b- =a"},
		{"too many", "a+ a b+ b c+ c d+ d =d<a,b,c e+ !e 1h !e b- e =e<a,c,d"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, mac := newClocked(8), guestMAC(1)
			for i, step := range strings.Fields(tt.play) {
				if got := c.step(mac, step); got != step {
					t.Fatalf("step %d of %q: %s", i, tt.play, got)
				}
			}
		})
	}
}

// step returns what has come of a step: the same, if it is as it should be.
func (c *clocked) step(mac MAC, step string) string {
	if d, err := time.ParseDuration(step); err == nil {
		c.at += d
		return step
	}
	name, end := strings.Trim(step, "!+-."), step[len(step)-1]
	p := c.ports[name]
	switch {
	case step[0] == '=':
		return "=" + c.lookup(mac).String()
	case end == '+':
		c.begin(name)
	case end == '-':
		c.forget(p)
	case end == '.':
		c.say(p, guestMAC(100+int(name[0])))
	default:
		if !c.say(p, mac) {
			return "!" + name
		}
		return name
	}
	return step
}

func (e *entry) String() string {
	if e == nil {
		return "-"
	}
	var names []string
	for _, p := range e.older {
		names = append(names, p.Name)
	}
	if len(names) == 0 {
		return e.port.Name
	}
	return e.port.Name + "<" + strings.Join(names, ",")
}

// TestFlapping: however ports fight for addresses, each has as many as it may, and of those that have ended nothing is left.
func TestFlapping(t *testing.T) {
	const limit, macs = 4, 10
	c := newClocked(limit)
	rnd := rand.New(rand.NewPCG(1, 2))
	var ports []*Port
	for range 200000 {
		switch i := rnd.IntN(40); {
		case i == 0 && len(ports) < 12:
			ports = append(ports, c.begin(fmt.Sprint(len(ports))))
		case i == 1 && len(ports) > 0:
			k := rnd.IntN(len(ports))
			c.forget(ports[k])
			ports = slices.Delete(ports, k, k+1)
		case i < 4:
			c.at += time.Duration(rnd.Int64N(int64(time.Minute)))
		case len(ports) > 0:
			c.say(ports[rnd.IntN(len(ports))], guestMAC(rnd.IntN(macs)))
		}
		c.check(t, limit, ports)
	}
	for _, p := range ports {
		c.forget(p)
	}
	if len(c.entries) != 0 {
		t.Errorf("left is %v", c.entries)
	}
	if c.moves.Load() < 100 {
		t.Errorf("the addresses have moved %d times only", c.moves.Load())
	}
}

func (c *clocked) check(t *testing.T, limit int, running []*Port) {
	t.Helper()
	for _, p := range running {
		if len(p.addresses.learned) > limit {
			t.Fatalf("a port has %d addresses", len(p.addresses.learned))
		}
	}
	for mac, e := range c.entries {
		if len(e.older) > maxOlder {
			t.Fatalf("an address has %d earlier holders", len(e.older))
		}
		for _, p := range append([]*Port{e.port}, e.older...) {
			if !slices.Contains(running, p) {
				t.Fatalf("%s is behind a port that has ended", mac)
			}
			if !slices.Contains(p.addresses.learned, mac) {
				t.Fatalf("%s is not among its port's", mac)
			}
		}
		began := func(a, b *Port) int { return int(a.began - b.began) }
		if !slices.IsSortedFunc(append(slices.Clone(e.older), e.port), began) {
			t.Fatalf("%s: %s is not in order", mac, e)
		}
	}
}

// TestReconnect: a machine whose old connection is dead, and nobody knows, is heard by its new one at once and gets its frames there.
func TestReconnect(t *testing.T) {
	gw := &gateway{}
	b := newBed(t, Config{Gateway: gw})
	b.sw.table.quiet = time.Hour // it is not waited for
	old, other := b.stream(1, Options{Framing: QEMU}, PortConfig{}), b.stream(2, Options{}, PortConfig{})
	old.say(gatewayMAC, 1)
	other.say(gatewayMAC, 2)
	b.until(func() bool { return len(gw.numbers()) == 2 })

	back := b.stream(1, Options{Framing: Usernet}, PortConfig{})
	back.say(gatewayMAC, 3)
	b.until(func() bool { return len(gw.numbers()) == 3 })
	b.sw.Send([]Frame{{Head: frame(back.mac, gatewayMAC, 60, 4)}})
	back.hears(4)
	other.say(back.mac, 5)
	back.hears(5)
	if p := b.sw.PortOf(back.mac); p != back.port {
		t.Errorf("the address is behind port %d", p.ID)
	}
	old.conn.Close()
	<-old.ended
	other.say(back.mac, 6)
	back.hears(6)
	if n := back.port.Stats().Spoofed; n != 0 {
		t.Errorf("%d of its frames were not heard", n)
	}
}

// TestReconnectStuck: what waits for room at the old connection, which nobody reads, goes on by the new one.
func TestReconnectStuck(t *testing.T) {
	b := newBed(t, Config{})
	old := b.stream(1, Options{Framing: QEMU}, PortConfig{})
	old.say(gatewayMAC, 1)
	b.until(func() bool { return b.sw.PortOf(old.mac) == old.port })
	f := []Frame{{Head: frame(old.mac, gatewayMAC, 60000, 2)}}
	for b.sw.Send(f) == 0 {
	}
	waited := make(chan bool, 1)
	go func() { waited <- b.sw.AwaitRoom(old.mac, nil) }()
	b.until(func() bool {
		old.port.queue.mu.Lock()
		defer old.port.queue.mu.Unlock()
		return old.port.queue.room != nil
	})
	back := b.stream(1, Options{Framing: QEMU}, PortConfig{})
	back.say(gatewayMAC, 3)
	if !<-waited {
		t.Error("nobody has the address")
	}
	if full := b.sw.Send(f); full != 0 {
		t.Error("no room at the new connection")
	}
	back.hears(2)
}

// TestThief: a guest that takes the address of one that is silent has it until that one is asked for anything.
func TestThief(t *testing.T) {
	gw := &gateway{}
	b := newBed(t, Config{Gateway: gw})
	b.sw.table.quiet = time.Hour
	victim := b.stream(1, Options{}, PortConfig{})
	victim.say(gatewayMAC, 1)
	b.until(func() bool { return len(gw.numbers()) == 1 })
	thief := b.stream(1, Options{}, PortConfig{})
	thief.say(gatewayMAC, 2)
	b.until(func() bool { return b.sw.PortOf(victim.mac) == thief.port })
	b.sw.Send([]Frame{{Head: frame(victim.mac, gatewayMAC, 60, 3)}})
	victim.hears(3)
	thief.hears(3)
	victim.say(gatewayMAC, 4)
	b.until(func() bool { return b.sw.PortOf(victim.mac) == victim.port })
	thief.say(gatewayMAC, 5)
	again := b.stream(1, Options{}, PortConfig{})
	again.say(gatewayMAC, 6)
	b.until(func() bool { return thief.port.Stats().Spoofed+again.port.Stats().Spoofed == 2 })
	b.sw.Send([]Frame{{Head: frame(victim.mac, gatewayMAC, 60, 7)}})
	victim.hears(7)
	thief.conn.SetReadDeadline(time.Now())
	if frames, err := thief.Receive(); err == nil {
		t.Errorf("the thief hears frame %d", numberOf(frames[0]))
	}
	victim.say(gatewayMAC, 8)
	b.until(func() bool { return slices.Equal(gw.numbers(), []uint32{1, 2, 4, 8}) })
}
