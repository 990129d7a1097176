//go:build race

package vmnet

const raceEnabled = true
