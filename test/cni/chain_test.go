package cni_test

import (
	"fmt"
	"strings"
)

// after: the official plugins behind usernet.
func after(r *rig) {
	for _, c := range []chain{
		{name: "user", plugins: []string{
			usernetPlugin(`, "subnet": "10.213.0.0/24"`),
			`{"type": "firewall"}`,
			`{"type": "tuning", "sysctl": {"net.ipv4.conf.eth0.log_martians": "1"}}`,
		}},
		{name: "bridged", plugins: []string{
			usernetPlugin(`, "mode": "bridge", "ipam": {"type": "host-local", "subnet": "10.214.0.0/24"}`),
			`{"type": "bandwidth", "ingressRate": 8000000, "ingressBurst": 8000000, "egressRate": 8000000, "egressBurst": 8000000}`,
			`{"type": "firewall"}`,
			`{"type": "tuning"}`,
		}},
		// The ports by the official plugin: usernet is not told of them.
		{name: "mapped", plugins: []string{
			`{"type": "usernet", "mode": "bridge", "subnet": "10.216.0.0/24"}`,
			`{"type": "portmap", "capabilities": {"portMappings": true}}`,
			`{"type": "firewall"}`,
		}},
	} {
		space := r.space()
		result := r.chainAdd(c, space, 8080)
		r.serve(space)
		r.in("peer "+hostIP, space, r.probe(), "fetch", "http://"+far+"/")
		r.page(r.outside(), hostIP+":8080", "hello from")
		r.chainCheck(c, space, 8080, result)
		r.chainDel(c, space, 8080, result)
	}
}

// before: the official bridge makes the interface and usernet publishes its ports.
func before(r *rig) {
	bridge := strings.Replace(official("").plugins[0], `"ipMasq": true`, `"ipMasq": false`, 1) // which it would leave with the lost container
	c := chain{name: "theirs", plugins: []string{bridge, `{"type": "firewall"}`, `{"type": "usernet", "capabilities": {"portMappings": true}}`}}
	for range 2 {
		space := r.space()
		result := r.chainAdd(c, space, 8080)
		if strings.Count(result, `"sandbox"`) != 1 || !strings.Contains(result, "cni9") {
			r.Errorf("result %s", result)
		}
		r.serve(space)
		for _, a := range []string{"127.0.0.1", "[::1]", hostIP} {
			r.page(r.host(), a+":8080", "hello from")
		}
		r.page(r.outside(), hostIP+":8080", "hello from")
		r.chainCheck(c, space, 8080, result)
		other := r.space()
		theirs := strings.ReplaceAll(strings.ReplaceAll(result, space, other), `"10.222.0.`, `"10.222.0.9`)
		if out, err := r.call(c, 2, "ADD", other, 8080, theirs); err == nil || !strings.Contains(out, `"code":100`) {
			r.Errorf("the same port twice: %s, %v; want code 100", out, err)
		}
		r.restart(func() {})
		r.page(r.outside(), hostIP+":8080", "hello from")
		r.chainDel(c, space, 8080, result)
		r.noPage(r.host(), "127.0.0.1:8080")
	}
	// The container goes without a word.
	lost := r.space()
	result := r.chainAdd(c, lost, 8080)
	r.dropSpace(base(lost))
	r.restart(func() {})
	r.wait(patience, "the lost container to be forgotten", r.nobody)
	r.run("ip", "netns", "add", base(lost))
	r.chainDel(c, lost, 8080, result)
}

// bandwidth: what a container sends and receives is limited, on both kinds of network.
func bandwidth(r *rig) {
	for _, c := range networks("") {
		r.write(c)
		space := r.space()
		env := []string{`CAP_ARGS={"bandwidth": {"ingressRate": 40000000, "ingressBurst": 1000000, "egressRate": 8000000, "egressBurst": 400000}}`}
		r.tool(env, "add", c.name, space)
		// The echo server sends back what comes, so the lesser limit rules: 1 MB at 8 Mbit/s is a second.
		start := now()
		r.in("", space, r.probe(), "bulk", far+":7", fmt.Sprint(1<<20))
		if took := now() - start; took < 0.7 {
			r.Errorf("%s: 1 MB went out and in in %.2f s", c.name, took)
		}
		r.tool(env, "del", c.name, space)
	}
}
