package cni_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"

	"github.com/usernet/usernet/test/engine"
)

// containerd: ctr run --cni, on every kind of network.
func containerd(r *rig) {
	if err := r.e.StartContainerd(r.Context()); err != nil {
		r.Fatal(err)
	}
	defer func() {
		if err := r.e.StopContainerd(); err != nil {
			r.Error(err)
		}
	}()
	spec := r.spec("sh", "-c", "ip addr show eth0; probe fetch http://"+far+"/")
	for _, c := range networks("") {
		r.write(c)
		out := r.run("ctr", "run", "--rm", "--cni", "--config", spec, "box")
		subnet := map[string]string{"user": "10.213.0.", "bridged": "10.214.0."}[c.name]
		if !strings.Contains(out, subnet) || !strings.Contains(out, "peer "+hostIP) {
			r.Errorf("%s: the container printed %s", c.name, out)
		}
		r.wait(patience, "the container to be forgotten", r.nobody)
		r.forget()
	}
}

// spec writes the configuration of a container that runs a command of the test image, and returns its path. containerd's own
// wants controllers of cgroups that the pretend host does not have.
func (r *rig) spec(args ...string) string {
	r.Helper()
	path := filepath.Join(r.e.Dir, "config.json")
	os.Remove(path)
	r.run("runc", "spec", "--bundle", r.e.Dir)
	text, err := os.ReadFile(path)
	if err != nil {
		r.Fatal(err)
	}
	var c map[string]any
	if err := json.Unmarshal(text, &c); err != nil {
		r.Fatal(err)
	}
	process := c["process"].(map[string]any)
	process["args"], process["terminal"] = args, false
	c["root"] = map[string]any{"path": filepath.Join(r.e.Dir, "rootfs")}
	if text, err = json.Marshal(c); err == nil {
		err = os.WriteFile(path, text, 0o644)
	}
	if err != nil {
		r.Fatal(err)
	}
	return path
}

// podman: Podman 4.3 with its CNI backend. It binds the published ports itself, beforehand.
func podman(r *rig) {
	defer r.e.Run(r.background(), "podman", "rm", "-f", "-a", "-t", "0")
	for _, c := range networks("") {
		r.write(c)
		net := c.name
		r.podman("run", "-d", "--name", "www", "--hostname", "www", "--network", net, "--network-alias", "shop", "-p", "8080:80", "-p", "127.0.0.1:8081:81/tcp", engine.Image)
		for _, a := range []string{"127.0.0.1", "[::1]", hostIP} {
			r.page(r.host(), a+":8080", "hello from www")
		}
		r.page(r.outside(), hostIP+":8080", "hello from www", "peer "+router)
		addr := r.podman("inspect", "-f", "{{(index .NetworkSettings.Networks \""+net+"\").IPAddress}}", "www")
		for _, name := range []string{"www", "shop", addr} {
			out := r.podman("run", "--rm", "--network", net, engine.Image, "probe", "fetch", "http://"+name+"/")
			if !strings.Contains(out, "hello from www") {
				r.Errorf("by %s: %s", name, out)
			}
		}
		out := r.podman("run", "--rm", "--network", net, "--ip", addr[:strings.LastIndexByte(addr, '.')]+".77", "--mac-address", "02:00:00:00:00:77", engine.Image,
			"sh", "-c", "ip addr show eth0; probe fetch http://"+far+"/")
		if !strings.Contains(out, ".77/24") || !strings.Contains(out, "02:00:00:00:00:77") || !strings.Contains(out, "peer "+hostIP) {
			r.Errorf("a container with addresses of its own printed %s", out)
		}
		r.podman("restart", "-t", "0", "www")
		r.page(r.outside(), hostIP+":8080", "hello from www")
		r.restart(func() {})
		r.page(r.outside(), hostIP+":8080", "hello from www")
		r.podman("rm", "-f", "-t", "0", "www")
		r.noPage(r.host(), "127.0.0.1:8080")
	}
	r.podman("run", "-d", "--name", "both", "--network", "user", "--network", "bridged", "-p", "8080:80", engine.Image)
	r.page(r.outside(), hostIP+":8080", "hello from")
	var links []struct{ IfName string }
	if err := json.Unmarshal([]byte(r.podman("exec", "both", "sh", "-c", `printf '['; ls /sys/class/net | grep eth | sed 's/.*/{"ifname":"&"}/' | paste -sd,; printf ']'`)), &links); err != nil || len(links) != 2 {
		r.Errorf("interfaces %v, %v", links, err)
	}
	r.podman("rm", "-f", "-t", "0", "both")
}

func (r *rig) podman(args ...string) string {
	r.Helper()
	out, err := r.e.Run(r.background(), "podman", args...)
	if err != nil {
		r.Fatal(err)
	}
	return out
}
